"""A family of another package: PixArt-alpha, a diffusion transformer with a T5 text encoder.

Every command takes such a folder as `--model`.
"""

import torch

from fastunlearn.models.base import Group, Model


class PixArtAlpha(Model):
    family = "pixart-alpha"
    pipelines = ("PixArtAlphaPipeline",)
    parts = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    groups = {"cross-attention": Group("every parameter of the attn2 blocks", only=("attn2",)), "all": Group("all")}

    def encode_texts(self, texts):
        states, mask, _, _ = self.pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, device=self.device, clean_caption=False
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def predict(self, latents, timesteps, conditions, denoiser=None):
        network, count, size = denoiser or self.denoiser, len(latents), self.denoiser.config.sample_size
        more = {"resolution": None, "aspect_ratio": None}
        if size == 128:  # the large model also reads the image's size
            more = {"resolution": torch.tensor([[8.0 * size] * 2] * count), "aspect_ratio": torch.ones(count, 1)}
            more = {name: value.to(latents) for name, value in more.items()}
        prediction = network(
            latents.to(self.dtype),
            timestep=timesteps.expand(count),
            added_cond_kwargs=more,
            return_dict=False,
            **{name: values.to(self.dtype) for name, values in conditions.items()},
        )
        return prediction[0].chunk(2, dim=1)[0].float()  # the second half is a variance, which no sampler uses
