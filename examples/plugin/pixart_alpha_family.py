"""A family of another package: PixArt-Alpha, a diffusion transformer, as `--model` of every command."""

import torch

from fastunlearn.models.base import Group, Model


class PixArtAlpha(Model):
    family = "pixart-alpha"
    pipelines = ("PixArtAlphaPipeline",)
    parts = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    groups = {  # noqa: RUF012
        "cross-attention": Group("every parameter of the attn2 blocks", only=("attn2",)),
        "all": Group("every parameter"),
    }
    text_readers = "caption_projection.linear_1.weight"

    def encode_texts(self, texts):
        states, mask, _, _ = self.pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, device=self.device, clean_caption=False
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def predict(self, latents, timesteps, conditions, denoiser=None):
        network = self.denoiser if denoiser is None else denoiser
        size = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.config.sample_size == 128:  # the model for 1024 px is told so
            width, height = self.image_size
            told = torch.tensor([[height, width]], dtype=self.dtype, device=self.device).expand(len(latents), -1)
            size = {"resolution": told, "aspect_ratio": told[:, :1] / told[:, 1:]}
        prediction = network(
            latents.to(self.dtype),
            timestep=timesteps.expand(len(latents)),
            added_cond_kwargs=size,
            return_dict=False,
            **{name: values.to(self.dtype) for name, values in conditions.items()},
        )
        return prediction[0].chunk(2, dim=1)[0].float()  # the second half is a variance, which no sampler uses
