"""The loss and the optimizer in a training loop of your own: plain diffusers, and `fastunlearn_kernels` alone.

It is ESD's step: the student's answer for the concept is pulled to `unconditional - eta * (concept - unconditional)`,
two frozen predictions mixed by coefficients.  Only the most salient tenth of the cross-attention may change.
"""

import copy

import fastunlearn_kernels as fk
import torch
from diffusers import StableDiffusionPipeline

from fastunlearn.worlds.shapes import pipeline_folder  # or the folder of any Stable Diffusion

CONCEPT, ETA, STEPS, BATCH = "a star", 2.0, 20, 4
torch.manual_seed(0)
pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder("shapes"), safety_checker=None)
pipeline.set_progress_bar_config(disable=True)
student, teacher = pipeline.unet, copy.deepcopy(pipeline.unet).requires_grad_(False)
student.requires_grad_(False)
parameters = [p.requires_grad_(True) for name, p in student.named_parameters() if "attn2" in name]

with torch.no_grad():
    concept, unconditional = pipeline.encode_prompt([CONCEPT] * BATCH, "cpu", 1, do_classifier_free_guidance=True)
    clean = pipeline([CONCEPT] * BATCH, num_inference_steps=20, guidance_scale=3.0, output_type="latent").images
coefficients = torch.tensor([[1 + ETA, -ETA]]).repeat(BATCH, 1)


def loss_of_a_batch():
    """Rows at random timesteps; the target is never made, the kernel mixes it while it reads."""
    timesteps, noise = torch.randint(1000, (BATCH,)), torch.randn_like(clean)
    latents = pipeline.scheduler.add_noise(clean, noise, timesteps)
    with torch.no_grad():
        both = [teacher(latents, timesteps, states).sample for states in (unconditional, concept)]
    predicted = student(latents, timesteps, concept).sample
    return fk.noise_pred_loss(predicted, torch.stack(both), coefficients, weights=torch.ones(BATCH))[0]


gradients = torch.autograd.grad(loss_of_a_batch(), parameters)
masks = fk.saliency_mask(list(gradients), density=0.1)  # packed, one bit per element
optimizer = fk.MaskedAdamW(
    parameters, lr=1e-3, grad_masks=dict(zip(parameters, masks, strict=True)), weight_decay=0.0, compact=True
)
for step in range(STEPS):
    optimizer.zero_grad()
    loss = loss_of_a_batch()
    loss.backward()
    factor, norm = optimizer.clip_factor(1.0)
    optimizer.step(grad_scale=factor)
    if step % 5 == 0:
        print(f"step {step:3d}  loss {loss.item():.4f}  gradient {norm.item():.4f}")
changed = sum((a != b).sum().item() for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
print(f"{changed:,} of {sum(p.numel() for p in parameters):,} elements of the cross-attention have changed")
