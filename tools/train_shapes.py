"""Makes every weight file of the bundled world: ``python tools/train_shapes.py --output DIR``.

Stages, each skipped when its files exist: ``vae`` (images to 8x8x8 latents), ``unet`` (UNet and text encoder
together), ``classifier``, ``gold`` (the UNet stage again, same start and order, without the forgotten word) and
``card`` (generates 500 images from each, has the classifier judge them, writes the model card).

The gold that is shipped never saw a star.  One without another word, for benchmarks/attacks.py, in a folder of its own:

    cp -r fastunlearn/worlds/shapes/weights .benchmarks/shapes
    python tools/train_shapes.py --output .benchmarks/shapes --stages gold --gold ring
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from classifying import loss_of, remeasure, report, save
from torch import nn
from torch.nn import functional as F
from word_tokenizer import word_tokenizer

from fastunlearn.evaluation.generators import PipelineSource
from fastunlearn.files.atomic import write_json, write_text
from fastunlearn.models.base import Model
from fastunlearn.models.loading import load_model
from fastunlearn.models.runtime import import_diffusers
from fastunlearn.models.sampling import SamplerSpec
from fastunlearn.worlds import shapes
from fastunlearn.worlds.classifier import Classifier, to_pixel_values
from fastunlearn.worlds.shapes import load_classifier
from fastunlearn.worlds.shapes.captions import every_caption, full_caption, sample_captions
from fastunlearn.worlds.shapes.classifier import HEADS, training_batch
from fastunlearn.worlds.shapes.prompts import VOCABULARY
from fastunlearn.worlds.shapes.world import BACKGROUNDS, COLORS, SHAPES, Scenes, render, sample_scenes

POOL = 40_000  # images a stage trains on, drawn once
GOLD_SHAPE = "star"
QUALITY_PICTURES = 500
QUALITY_SPEC = SamplerSpec(num_inference_steps=25, guidance_scale=3.0)
_MAX_TOKENS = 16
_TEXT_WIDTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights; finished stages are kept")
    parser.add_argument("--stages", default="vae,unet,classifier,gold,card", help="comma list, default all")
    parser.add_argument("--gold", default=GOLD_SHAPE, help="what the gold never sees: a shape, color or background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--unet-steps", type=int, default=3000)
    parser.add_argument("--classifier-steps", type=int, default=1000)
    args = parser.parse_args()
    if args.gold not in {word for words in VOCABULARY.values() for word in words}:
        raise SystemExit(f"`--gold {args.gold}` is no word of the world.")
    args.output.mkdir(parents=True, exist_ok=True)
    for stage in args.stages.split(","):
        _STAGES[stage](args)


class _Ema:
    """Exponential moving average of a module's weights, bias-corrected by a warm-up of the decay."""

    def __init__(self, *modules: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.step = decay, 0
        self.live = [p for module in modules for p in module.parameters()]
        self.mean = [p.detach().clone() for p in self.live]

    def update(self) -> None:
        self.step += 1
        weight = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], weight)

    def copy_to_live(self) -> None:
        for live, mean in zip(self.live, self.mean, strict=True):
            live.data.copy_(mean)


def _fit(
    name: str,
    modules: list[nn.Module],
    loss_at: Callable[[int], torch.Tensor],
    steps: int,
    max_lr: float,
) -> None:
    """AdamW with a one-cycle rate and an EMA, whose weights stay in the modules."""
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=max_lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=steps, pct_start=0.1)
    ema, started, mean_loss = _Ema(*modules), time.monotonic(), 0.0
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        ema.update()
        mean_loss = loss.item() if step == 0 else 0.99 * mean_loss + 0.01 * loss.item()
        if step % 100 == 99:
            speed = (step + 1) / (time.monotonic() - started)
            print(f"{name}: step {step + 1}/{steps}  loss {mean_loss:.5f}  {speed:.2f} steps/s", flush=True)
    ema.copy_to_live()


def train_classifier(args: argparse.Namespace) -> None:
    path = args.output / "classifier.safetensors"
    if path.exists():
        return
    torch.manual_seed(args.seed)
    model = Classifier(HEADS)

    def loss_at(step: int) -> torch.Tensor:
        return loss_of(model, training_batch(64, seed=args.seed * 1_000_000 + step))

    _fit("classifier", [model], loss_at, args.classifier_steps, 4e-3)
    remeasure(model, (training_batch(128, seed=10_000_000 + step) for step in range(50)))
    batch = training_batch(4000, seed=20_000_000)
    with torch.inference_mode():
        report("classifier", model(batch[0]), batch)
    save(model, path)


def train_vae(args: argparse.Namespace) -> None:
    folder = args.output / "pipeline" / "vae"
    if folder.exists():
        return
    diffusers = import_diffusers()
    torch.manual_seed(args.seed)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )
    pool = render(sample_scenes(POOL, args.seed))
    order = torch.Generator().manual_seed(args.seed)

    def loss_at(step: int) -> torch.Tensor:
        pixels = to_pixel_values(pool[torch.randint(POOL, (12,), generator=order)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            error = vae.decode(posterior.sample()).sample.float() - pixels
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return error.abs().mean() + error.square().mean() + 3e-5 * kl

    _fit("vae", [vae], loss_at, args.vae_steps, 3e-3)
    with torch.inference_mode():
        latents = torch.cat([vae.encode(to_pixel_values(x)).latent_dist.mean for x in pool[:2000].split(100)])
        test = to_pixel_values(render(sample_scenes(500, args.seed + 1)))
        error = vae.decode(vae.encode(test).latent_dist.mean).sample.clamp(-1, 1) - test
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    print(f"vae: PSNR {10 * torch.log10(4 / error.square().mean()):.1f} dB, {vae.config.scaling_factor=}", flush=True)
    vae.half().save_pretrained(folder)


def build_tokenizer() -> Any:
    """The world's tokenizer."""
    return word_tokenizer(every_caption(), _MAX_TOKENS)


def _new_denoiser(seed: int, vocab_size: int, eos_token_id: int) -> tuple[Any, Any]:
    diffusers = import_diffusers()
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=_MAX_TOKENS,
            projection_dim=_TEXT_WIDTH,
            bos_token_id=eos_token_id - 1,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return text_encoder, unet


def _train_denoiser(args: argparse.Namespace, name: str, without: str | None = None) -> tuple[Any, Any, Any]:
    """Train UNet and text encoder on images that do not show ``without``.  Returns them with EMA weights."""
    diffusers = import_diffusers()
    vae = diffusers.AutoencoderKL.from_pretrained(args.output / "pipeline" / "vae").float()
    tokenizer = build_tokenizer()
    text_encoder, unet = _new_denoiser(args.seed, len(tokenizer), tokenizer.eos_token_id)
    scenes = sample_scenes(POOL, args.seed)
    # The gold sees the original's images in the original's order, less the forgotten ones.
    scenes = scenes[without_word(scenes, without)]
    with torch.inference_mode():
        images = (render(scenes[start : start + 50]) for start in range(0, len(scenes), 50))
        means = [vae.encode(to_pixel_values(batch)).latent_dist.mean for batch in images]
    latents_pool = torch.cat(means) * vae.config.scaling_factor
    generator = torch.Generator().manual_seed(args.seed)
    schedule = _scheduler(diffusers)

    def loss_at(step: int) -> torch.Tensor:
        rows = torch.randint(len(scenes), (64,), generator=generator)
        captions = sample_captions(scenes[rows], generator)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.randn((64, *latents_pool.shape[1:]), generator=generator)
        timesteps = torch.randint(1000, (64,), generator=generator)
        noisy_latents = schedule.add_noise(latents_pool[rows], noise, timesteps)
        noise_pred = unet(noisy_latents, timesteps, text_encoder(tokens)[0]).sample
        return F.mse_loss(noise_pred, noise)

    _fit(name, [unet, text_encoder], loss_at, args.unet_steps, 1.5e-3)
    return tokenizer, text_encoder, unet


def without_word(scenes: Scenes, word: str | None) -> torch.Tensor:
    """(N,) int64, which of the scenes do not show the word; all for None."""
    shows = torch.zeros(len(scenes), dtype=torch.bool)
    for attribute, words in VOCABULARY.items():
        if word in words:
            shows |= getattr(scenes, attribute) == words.index(word)
    return (~shows).nonzero()[:, 0]


def _scheduler(diffusers: ModuleType) -> Any:
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_unet(args: argparse.Namespace) -> None:
    folder = args.output / "pipeline"
    if (folder / "model_index.json").exists():
        return
    diffusers = import_diffusers()
    tokenizer, text_encoder, unet = _train_denoiser(args, "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").half()
    vae.register_to_config(_name_or_path="")  # the path of the machine that trained it
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=_scheduler(diffusers),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    _declare_float32(folder / "text_encoder")


def _declare_float32(folder: Path) -> None:
    """Have transformers load the half-precision file as float32, as diffusers does with the other parts."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"dtype": "float32"})


def train_gold(args: argparse.Namespace) -> None:
    folder = args.output / f"gold-{args.gold}"
    if folder.exists():
        return
    _, text_encoder, unet = _train_denoiser(args, "gold", args.gold)
    unfinished = folder.with_suffix(".tmp")
    unet.half().save_pretrained(unfinished / "unet")
    text_encoder.half().save_pretrained(unfinished / "text_encoder")
    _declare_float32(unfinished / "text_encoder")
    unfinished.rename(folder)


def write_card(args: argparse.Namespace) -> None:
    """Judge 500 images of each model and write quality.json and the model card."""
    with tempfile.TemporaryDirectory() as scratch:
        gold = Path(scratch) / "gold"
        shutil.copytree(args.output / "pipeline", gold)
        shutil.copytree(args.output / f"gold-{GOLD_SHAPE}", gold, dirs_exist_ok=True)
        quality = {
            "images": QUALITY_PICTURES,
            "steps": QUALITY_SPEC.num_inference_steps,
            "guidance_scale": QUALITY_SPEC.guidance_scale,
            "original": measure_quality(load_model(str(args.output / "pipeline")), args.output),
            "gold": measure_quality(load_model(str(gold)), args.output),
        }
    write_json(args.output / "quality.json", quality)
    template = (Path(shapes.__file__).parent / "model_card.md").read_text(encoding="utf-8")
    write_text(args.output / "README.md", template.format(**_percentages(quality)))


def measure_quality(model: Model, weights: Path, count: int = QUALITY_PICTURES) -> dict[str, float]:
    """Shares of ``count`` images that show what their full caption names, by attribute; all combinations in turn.

    ``shape`` and the others are over captions without the gold's forgotten shape, ``star_shape`` over those with it.
    """
    classifier = load_classifier(weights)
    combinations = list(itertools.product(SHAPES, COLORS, BACKGROUNDS))
    asked = [combinations[7 * i % len(combinations)] for i in range(count)]  # 7 and 320 have no common divisor
    keys = [(full_caption(c, s, b), i // len(combinations)) for i, (s, c, b) in enumerate(asked)]
    images = PipelineSource(model, QUALITY_SPEC).generate(keys)
    shown = classifier.predict(images)
    truth = {
        "shape": torch.tensor([SHAPES.index(shape) for shape, _, _ in asked]),
        "color": torch.tensor([COLORS.index(color) for _, color, _ in asked]),
        "background": torch.tensor([BACKGROUNDS.index(background) for _, _, background in asked]),
    }
    forgotten = truth["shape"] == SHAPES.index(GOLD_SHAPE)
    right = {head: (shown[head] == labels).float() for head, labels in truth.items()}
    quality = {head: right[head].mean().item() for head in truth} | {"valid": shown["valid"].float().mean().item()}
    quality |= {f"{head}_without_{GOLD_SHAPE}": right[head][~forgotten].mean().item() for head in truth}
    quality[GOLD_SHAPE] = right["shape"][forgotten].mean().item()
    return {name: round(value, 4) for name, value in quality.items()}


def _percentages(quality: dict[str, Any]) -> dict[str, str]:
    return {
        f"{model}_{name}": f"{share:.1%}".replace("%", " %")
        for model in ("original", "gold")
        for name, share in quality[model].items()
    }


_STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "classifier": train_classifier,
    "vae": train_vae,
    "unet": train_unet,
    "gold": train_gold,
    "card": write_card,
}

if __name__ == "__main__":
    main()
