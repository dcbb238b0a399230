"""A family as another package would add it: PixArt-Sigma, by the entry ``pixart = "pixart_family:PixArt"``."""

from fastunlearn.models.base import Group, Model


class PixArt(Model):
    family = "pixart"
    pipelines = ("PixArtSigmaPipeline",)
    parts = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    groups = {  # noqa: RUF012
        "cross-attention": Group("every parameter of the attn2 blocks", only=("attn2",)),
        "all": Group("every parameter"),
    }

    def encode_texts(self, texts):
        states, mask, _, _ = self.pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, device=self.device, clean_caption=False
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def predict(self, latents, timesteps, conditions, denoiser=None):
        network = self.denoiser if denoiser is None else denoiser
        prediction = network(
            latents.to(self.dtype),
            timestep=timesteps.expand(len(latents)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
            **{name: values.to(self.dtype) for name, values in conditions.items()},
        )
        return prediction[0].chunk(2, dim=1)[0].float()  # the second half is a variance, which no sampler uses
