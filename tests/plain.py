"""Stable Diffusion in plain torch, float64: its own DDIM, guidance, targets and gradients, nothing of the engine's."""

import copy

import torch

from fastunlearn.models.sampling import initial_noise

NOISE = "\0noise"


class Plain:
    """``student`` and ``teacher``: the UNet in float64.  What is asked twice is computed once."""

    def __init__(self, model, steps, guidance=3.0, seed=0):
        pipeline = model.pipeline
        self.teacher = copy.deepcopy(pipeline.unet).double().requires_grad_(False)
        self.student = copy.deepcopy(self.teacher)
        self.text, self.tokenizer = copy.deepcopy(pipeline.text_encoder).double(), pipeline.tokenizer
        self.vae = copy.deepcopy(pipeline.vae).double()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
        self.alphas = (1 - betas).cumprod(0)
        spacing = 1000 // steps
        self.timesteps = [n * spacing + 1 for n in reversed(range(steps))]  # "leading", with an offset of 1
        self.steps, self.guidance, self.seed, self.shape = steps, guidance, seed, model.latent_shape
        self.spacing = spacing
        self.kept = {}

    @torch.no_grad()
    def states(self, prompt):
        if ("states", prompt) not in self.kept:
            ids = self.tokenizer(
                prompt.replace("\0unconditional", ""),
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            self.kept["states", prompt] = self.text(ids)[0]
        return self.kept["states", prompt]

    def asked(self, network, x, t, states):
        return network(x, t, encoder_hidden_states=states, return_dict=False)[0]

    @torch.no_grad()
    def t(self, x, t, prompt):
        """The teacher's prediction for a prompt, or for text states."""
        return self.asked(self.teacher, x, t, self.states(prompt) if isinstance(prompt, str) else prompt)

    def s(self, x, t, prompt):
        return self.asked(self.student, x, t, self.states(prompt) if isinstance(prompt, str) else prompt)

    def trajectory(self, prompt, number):
        """The points (x_t, t), and the image's latents."""
        if (prompt, number) not in self.kept:
            x = initial_noise([prompt], [self.seed * 1_000_003 + number], self.shape, "training").double()
            points = []
            for t in self.timesteps:
                points.append((x, t))
                without, with_prompt = self.t(x, t, ""), self.t(x, t, prompt)
                predicted = without + self.guidance * (with_prompt - without)
                now, then = self.alphas[t], self.alphas[max(t - self.spacing, 0)]
                clean = (x - (1 - now).sqrt() * predicted) / now.sqrt()
                x = then.sqrt() * clean + (1 - then).sqrt() * predicted
            self.kept[prompt, number] = points, x
        return self.kept[prompt, number]

    def point(self, prompt, number, k):
        return self.trajectory(prompt, number)[0][k]

    def noised(self, name, clean, number, k):
        """(x_t, t, noise) of an image's latents."""
        noise = initial_noise([f"{name}{NOISE}{k}"], [self.seed * 1_000_003 + number], self.shape, "training").double()
        t = self.timesteps[k]
        return self.alphas[t].sqrt() * clean + (1 - self.alphas[t]).sqrt() * noise, t, noise

    def noised_image(self, prompt, number, k):
        return self.noised(prompt, self.trajectory(prompt, number)[1], number, k)

    def encoded(self, pixels):
        """Latents of an image (H, W, 3) uint8."""
        values = torch.tensor(pixels).permute(2, 0, 1)[None].double() / 127.5 - 1
        with torch.no_grad():
            return self.vae.encode(values).latent_dist.mean * self.vae.config.scaling_factor

    def gradient(self, loss, names):
        """The loss' gradient by the student's parameters, all in one vector."""
        named = dict(self.student.named_parameters())
        parts = torch.autograd.grad(loss, [named[name] for name in names], allow_unused=True)
        zero = [torch.zeros_like(named[name]) for name in names]
        return torch.cat([(z if p is None else p).flatten() for p, z in zip(parts, zero, strict=True)])
