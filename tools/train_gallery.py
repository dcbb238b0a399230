"""Makes every weight file of the gallery: ``python tools/train_gallery.py --work DIR --output DIR``.

Stages, each skipped when its files exist and continued where it stopped:
``fetch`` (npm packages), ``autoencoder`` (64x64 images to latents), ``trunk`` (transformer and text encoders, without
the gold's style and object, to the point where the rate would fall), ``gold`` (the trunk, cooled down), ``original``
(the trunk, continued on everything, cooled down), ``judge``, ``style-judge`` (which never saw the pairs that the
original has not seen), ``card`` (quality.json, contact sheet, model card).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fastunlearn_gallery import words
from fastunlearn_gallery.captions import PHRASINGS, TEMPLATES, every_caption, full_caption
from fastunlearn_gallery.words import (
    BACKGROUNDS,
    GOLD_OBJECT,
    GOLD_STYLE,
    HEADS,
    HELD_OUT,
    OBJECTS,
    SIZE,
    STYLES,
    VOCABULARY,
    WIDTHS,
)
from fitting import Fit, run
from gallery_art import COPIES, OTHER_COPIES, OTHERS, Scenes, draw
from gallery_judges import STYLE_HEADS, STYLE_JUDGE, train_judge, train_style_judge
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from word_tokenizer import word_tokenizer

from fastunlearn.files.atomic import write_json, write_text
from fastunlearn.models.runtime import import_diffusers
from fastunlearn.worlds.classifier import Classifier, load_weights, to_pixel_values
from fastunlearn.worlds.phrasings import Phrasings

OTHER_SHARE = 0.4  # of the original's rows
LATENT_CHANNELS = 8
WIDTH = 192  # of the transformer
LAYERS = 6
TEXT_WIDTH = 128  # of each text encoder
MAX_TOKENS = 16
IMAGES = 500  # that the quality of each model is measured on
SAMPLING_STEPS = 25
GUIDANCE_SCALE = 3.0
BATCH = 25
TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"


def _differences(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]


def train_autoencoder(args: argparse.Namespace) -> None:
    folder = args.work / "vae"
    if folder.exists():
        return
    diffusers = import_diffusers()
    torch.manual_seed(args.seed)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pool = draw(args.work / "sets", COPIES)
    batch = 12

    def loss_at(step: int) -> torch.Tensor:
        chance = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        pixels = to_pixel_values(pool.pixels[torch.randint(len(pool), (batch,), generator=chance)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        latents = mean + std * torch.randn(mean.shape, generator=chance)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(latents).sample
        error = decoded.float() - pixels
        edges = sum(part.abs().mean() for part in _differences(error))
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        return error.abs().mean() + error.square().mean() + edges + 5e-6 * kl

    fit = Fit({"vae": vae}, outer=("conv_in", "conv_out"), lr=0.01, outer_lr=2e-3)
    run("autoencoder", fit, loss_at, args.autoencoder_steps, args.autoencoder_steps // 3, args.work / "vae.pt")
    test = draw(args.work / "sets", 1, args.seed + 1).pixels[:400]
    with torch.inference_mode():
        means = torch.cat([vae.encode(to_pixel_values(x)).latent_dist.mean for x in test.split(50)])
        decoded = torch.cat([vae.decode(x).sample.clamp(-1, 1) for x in means.split(50)])
    center, spread = means.mean().item(), means.std().item()
    vae.register_to_config(shift_factor=round(center, 4), scaling_factor=round(1 / spread, 4))
    psnr = 10 * torch.log10(4 / (decoded - to_pixel_values(test)).square().mean())
    write_json(args.work / "psnr.json", round(psnr.item(), 1))
    print(f"autoencoder: PSNR {psnr:.2f} dB, mean {center:.3f}, std {spread:.3f}", flush=True)
    print("per channel std", [round(v, 3) for v in means.std(dim=(0, 2, 3)).tolist()], flush=True)
    vae.save_pretrained(folder)


class JointAttention:
    """diffusers' joint attention where the last text token stands for ``repeats`` equal ones.

    Without T5, diffusers puts as many empty tokens behind the text as T5 would have read, 256 by default.  They are
    all alike in every layer, so one of them that counts 256 times is the same sum at a fraction of the work.
    """

    def __init__(self) -> None:
        self.repeats = 1

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, image_tokens = hidden_states.shape[:2]

        def heads(values: torch.Tensor) -> torch.Tensor:
            return values.view(batch, -1, attn.heads, values.shape[-1] // attn.heads).transpose(1, 2)

        query, key, value = (heads(project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v))
        text_query, text_key, text_value = (
            heads(project(encoder_hidden_states)) for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        query = torch.cat([attn.norm_q(query), attn.norm_added_q(text_query)], dim=2)
        key = torch.cat([attn.norm_k(key), attn.norm_added_k(text_key)], dim=2)
        value = torch.cat([value, text_value], dim=2)
        query, key = query.to(value.dtype), key.to(value.dtype)
        # On CPUs the backward pass of torch's fused attention takes longer than all the rest of a training step.
        scores = query @ (key * key.shape[-1] ** -0.5).mT
        if self.repeats > 1:
            bias = scores.new_zeros(scores.shape[-1])
            bias[-1] = math.log(self.repeats)
            scores = scores + bias
        mixed = scores.softmax(-1).to(value.dtype) @ value
        mixed = mixed.transpose(1, 2).reshape(batch, -1, attn.heads * mixed.shape[-1])
        image, text = mixed[:, :image_tokens], mixed[:, image_tokens:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](image), text


def build_tokenizer() -> Any:
    """The world's tokenizer, of both text encoders."""
    return word_tokenizer(every_caption(), MAX_TOKENS)


def _tokenizer(args: argparse.Namespace) -> Any:
    """The tokenizer of this training.  It is built once: which of two equally frequent pieces comes first is chance."""
    from transformers import CLIPTokenizer

    folder = args.work / "tokenizer"
    if not folder.exists():
        build_tokenizer().save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def _new_text_encoder(vocab_size: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
            attn_implementation="eager",  # for the same reason as above
        )
    )


def _new_generator(seed: int, vocab_size: int) -> dict[str, nn.Module]:
    """Transformer and text encoders.  The transformer's blocks begin as identities (adaLN-Zero, Peebles and Xie)."""
    diffusers = import_diffusers()
    torch.manual_seed(seed)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for name, parameter in transformer.named_parameters():
        if ".linear." in name or name.startswith("proj_out."):
            nn.init.zeros_(parameter)
    return {
        "transformer": transformer,
        "text_encoder": _new_text_encoder(vocab_size),
        "text_encoder_2": _new_text_encoder(vocab_size),
    }


def _encode_texts(modules: Mapping[str, nn.Module], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) to the states (B, L, D) and the pooled text (B, D), as the pipeline makes them."""
    read = [modules[name](tokens, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    return torch.cat([one.hidden_states[-2] for one in read], -1), torch.cat([one.text_embeds for one in read], -1)


def _latents(args: argparse.Namespace, pool: Scenes, file: str) -> torch.Tensor:
    """The scenes' latents (N, C, 16, 16) as the transformer sees them; made once."""
    diffusers = import_diffusers()
    path = args.work / file
    if not path.exists():
        vae = diffusers.AutoencoderKL.from_pretrained(args.work / "vae")
        with torch.inference_mode():
            means = [vae.encode(to_pixel_values(x)).latent_dist.mean for x in pool.pixels.split(60)]
        latents = (torch.cat(means) - vae.config.shift_factor) * vae.config.scaling_factor
        save_file({"latents": latents.half()}, path)
    return load_file(path)["latents"].float()


class Rows:
    """What the generator is trained on, as a function of the step.  ``gold``: without the gold's style and object.

    ``others``: a share of the rows are of further things, in captions that name them.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: Any, *, gold: bool, others: bool) -> None:
        self.tokenizer, self.pool = tokenizer, draw(args.work / "sets", COPIES)
        self.latents = _latents(args, self.pool, "latents.safetensors")
        is_gold = (self.pool.style == STYLES.index(GOLD_STYLE)) | (self.pool.object == OBJECTS.index(GOLD_OBJECT))
        self.allowed = self.pool.without_held_out()
        self.weights = torch.where(is_gold[self.allowed], 0.0 if gold else 2.0, 1.0)
        self.others = draw(args.work / "sets", OTHER_COPIES, words=OTHERS) if others else None
        if self.others is not None:
            self.other_latents = _latents(args, self.others, "others.safetensors")
            naming = [one for one in TEMPLATES if "{object}" in one[0] and len(one[0].split()) < 12]  # so that it fits
            words = {"style": STYLES, "object": OTHERS, "background": BACKGROUNDS}
            self.phrasings = Phrasings(naming, words, article="object", open={})

    def at(self, count: int, chance: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` rows: token ids (count, MAX_TOKENS) and clean latents (count, C, 16, 16)."""
        of_others = round(OTHER_SHARE * count) if self.others is not None else 0
        rows = self.allowed[torch.multinomial(self.weights, count - of_others, replacement=True, generator=chance)]
        captions, latents = _captions(PHRASINGS, self.pool, rows, chance), self.latents[rows]
        if self.others is not None:
            rows = torch.randint(len(self.others), (of_others,), generator=chance)
            captions += _captions(self.phrasings, self.others, rows, chance)
            latents = torch.cat([latents, self.other_latents[rows]])
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS)
        return torch.tensor(tokens.input_ids), latents


def _captions(phrasings: Phrasings, pool: Scenes, rows: torch.Tensor, chance: torch.Generator) -> list[str]:
    """A caption per scene, the phrasing drawn with its shares."""
    return phrasings.sample([values[rows] for values in (pool.style, pool.object, pool.background)], chance)


def _timesteps(count: int, chance: torch.Generator) -> torch.Tensor:
    """(count,) in (0, 1), logit-normal, spread evenly over a batch."""
    even = (torch.arange(count) + torch.rand(count, generator=chance)) / count
    return torch.sigmoid(torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4)))


def _train_generator(args: argparse.Namespace, name: str, *, steps: int, cooldown: int, start: str, trunk: str) -> None:
    """Train transformer and text encoders up to ``steps``; ``start``: a checkpoint to begin with, if there is one.

    ``trunk``: what the state before the rate falls is kept as; a longer training can continue from it.
    """
    tokenizer = _tokenizer(args)
    modules = _new_generator(args.seed, len(tokenizer))
    processor = JointAttention()
    modules["transformer"].set_attn_processor(processor)
    rows, count = Rows(args, tokenizer, gold=name == "gold", others=name == "original"), 48

    def loss_at(step: int) -> torch.Tensor:
        chance = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        tokens, clean = rows.at(count, chance)
        t = _timesteps(count, chance)[torch.randperm(count, generator=chance)]
        noise = torch.randn(clean.shape, generator=chance)
        noisy = torch.lerp(clean, noise, t[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            states, pooled = _encode_texts(modules, tokens)
            processor.repeats = 1
            if step % 5 == 0:  # so that the model also draws with diffusers' own 256 empty tokens
                states = F.pad(states, (0, 0, 0, 1))
                processor.repeats = 256
            velocity = modules["transformer"](
                hidden_states=noisy,
                timestep=t * 1000,
                encoder_hidden_states=states,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - clean)

    fit = Fit(modules, outer=("embedding", "pos_embed", ".linear.", "proj_out"), lr=0.01, outer_lr=1.5e-3)
    checkpoint = args.work / f"{name}.pt"
    if start and not checkpoint.exists():
        fit.load(args.work / start)
    run(name, fit, loss_at, steps, cooldown, checkpoint, args.work / trunk, decay=0.99)
    folder = args.work / name
    for part, module in modules.items():
        module.save_pretrained(folder / part)


def train_gold(args: argparse.Namespace) -> None:
    if not (args.work / "gold").exists():
        steps = args.trunk_steps + args.gold_steps
        _train_generator(args, "gold", steps=steps, cooldown=args.gold_steps, start="", trunk="trunk.pt")


def train_original(args: argparse.Namespace) -> None:
    if not (args.work / "original").exists():
        steps = args.trunk_steps + args.original_steps
        _train_generator(args, "original", steps=steps, cooldown=args.cooldown, start="trunk.pt", trunk="warm.pt")


# ---- what is shipped


def assemble(args: argparse.Namespace) -> None:
    """Put the trained parts together as diffusers has them, in half precision."""
    diffusers = import_diffusers()
    from transformers import CLIPTextModelWithProjection

    def parts(name: str) -> dict[str, Any]:
        folder = args.work / name
        read = CLIPTextModelWithProjection.from_pretrained
        return {
            "transformer": diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer").half(),
            "text_encoder": read(folder / "text_encoder").half(),
            "text_encoder_2": read(folder / "text_encoder_2").half(),
        }

    folder = args.output / "pipeline"
    if not folder.exists():
        tokenizer = _tokenizer(args)
        pipeline = diffusers.StableDiffusion3Pipeline(
            vae=diffusers.AutoencoderKL.from_pretrained(args.work / "vae").half(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
            **parts("original"),
        )
        _save(pipeline.save_pretrained, folder)
    if not (gold := args.output / "gold").exists():

        def save(unfinished: Path) -> None:
            for name, part in parts("gold").items():
                part.save_pretrained(unfinished / name)

        _save(save, gold)
    shutil.copyfile(args.work / "classifier.safetensors", args.output / "classifier.safetensors")


def _save(save: Callable[[Path], None], folder: Path) -> None:
    """Save whole or not at all, without this machine's paths, to be loaded as float32."""
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    save(unfinished)
    for path in unfinished.rglob("*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        for name in ("_name_or_path", "is_local", "local_files_only"):
            config.pop(name, None)
        if "dtype" in config:  # transformers would load the type of the file, diffusers loads float32
            config["dtype"] = "float32"
        write_json(path, config)
    unfinished.rename(folder)


def load_pipeline(weights: Path, gold: bool = False) -> Any:
    """The pipeline in plain diffusers; ``gold``: with the gold's parts."""
    diffusers = import_diffusers()
    no_t5 = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(weights / "pipeline", **no_t5)
    if gold:
        pipeline.transformer.load_state_dict(_floats(weights / "gold" / "transformer" / TRANSFORMER_FILE))
        for name in ("text_encoder", "text_encoder_2"):
            getattr(pipeline, name).load_state_dict(_floats(weights / "gold" / name / "model.safetensors"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _floats(path: Path) -> dict[str, torch.Tensor]:
    return {name: values.float() for name, values in load_file(path).items()}


def generate(pipeline: Any, prompts: Sequence[str], cache: Path | None = None, t5_tokens: int = 0) -> torch.Tensor:
    """Images (N, 3, SIZE, SIZE) uint8 of the prompts, the n-th from the seed n.  ``cache``: kept there by parts."""
    images = []
    for start in range(0, len(prompts), BATCH):
        part, path = prompts[start : start + BATCH], None if cache is None else cache / f"{start}.safetensors"
        if path is not None and path.exists():
            images.append(load_file(path)["images"])
            continue
        made = pipeline(
            list(part),
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            height=SIZE,
            width=SIZE,
            max_sequence_length=t5_tokens,
            generator=[torch.Generator().manual_seed(start + index) for index in range(len(part))],
            output_type="pt",
        ).images
        images.append((made * 255).round().to(torch.uint8))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"images": images[-1].contiguous()}, path)
    return torch.cat(images)


def asked(count: int) -> list[tuple[str, str, str]]:
    """``count`` of the (style, object, background) that the original was trained on, all in turn."""
    known = [one for one in itertools.product(STYLES, OBJECTS, BACKGROUNDS) if one[:2] not in HELD_OUT]
    return [known[7 * i % len(known)] for i in range(count)]  # 7 does not divide their number


def held_out() -> list[tuple[str, str, str]]:
    """The pairs that no training saw, each on four backgrounds."""
    return [(style, word, b) for style, word in sorted(HELD_OUT) for b in BACKGROUNDS[:4]]


def _digest(weights: Path, name: str) -> str:
    """What tells one version of a model's weights from another."""
    folders = [weights / "pipeline" / "vae", weights / "gold"] if name == "gold" else [weights / "pipeline"]
    files = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def _right(classifier: Classifier, images: torch.Tensor, wanted: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Per attribute (N,) bool: whether the judge names what was asked for; and whether it takes the image for valid."""
    shown = classifier.predict(images)
    truth = zip(("style", "object", "background"), zip(*wanted, strict=True), strict=True)
    right = {name: shown[name] == torch.tensor([HEADS[name].index(word) for word in words]) for name, words in truth}
    return right | {"valid": shown["valid"] == 1}


def measure_quality(classifier: Classifier, images: torch.Tensor, wanted: Sequence[tuple[str, str, str]]) -> dict:
    """Shares of images that show what was asked for, with and without the gold's two words."""
    right = _right(classifier, images, wanted)
    style = torch.tensor([one[0] == GOLD_STYLE for one in wanted])
    word = torch.tensor([one[1] == GOLD_OBJECT for one in wanted])
    shares = {name: hits.float().mean() for name, hits in right.items()}
    shares |= {f"{name}_without": right[name][~style & ~word].float().mean() for name in VOCABULARY}
    shares["gold_style"] = right["style"][style].float().mean()
    shares["gold_object"] = right["object"][word].float().mean()
    return {name: round(share.item(), 4) for name, share in shares.items()}


def _sheet(pool: Scenes, pipeline: Any, path: Path, cache: Path) -> None:
    """Styles by objects, each drawn above generated, on white."""
    pairs = list(itertools.product(STYLES, OBJECTS))
    made = generate(pipeline, [full_caption(style, word, "white") for style, word in pairs], cache / "sheet")
    rows = []
    for index in range(len(STYLES)):
        mine = (pool.style == index) & (pool.background == BACKGROUNDS.index("white"))
        first = [(mine & (pool.object == o)).nonzero()[0, 0] for o in range(len(OBJECTS))]
        rows += [torch.cat(list(pool.pixels[torch.stack(first)]), 2)]
        rows += [torch.cat(list(made[index * len(OBJECTS) : (index + 1) * len(OBJECTS)]), 2)]
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy()).save(path, optimize=True)


def write_card(args: argparse.Namespace) -> None:
    """Judge what both models generate; write quality.json, the contact sheet and the model card."""
    classifier = load_weights(Classifier(HEADS, WIDTHS), args.output / "classifier.safetensors")
    wanted, unseen, fresh = asked(IMAGES), held_out(), draw(args.work / "sets", 1, args.seed + 1)
    drawn = [
        (STYLES[s], OBJECTS[o], BACKGROUNDS[b])
        for s, o, b in zip(fresh.style.tolist(), fresh.object.tolist(), fresh.background.tolist(), strict=True)
    ]
    quality: dict[str, Any] = {
        "images": IMAGES,
        "steps": SAMPLING_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "psnr": json.loads((args.work / "psnr.json").read_text()),
        "trained": {"trunk": args.trunk_steps, "gold": args.gold_steps, "original": args.original_steps},
        "judge": measure_quality(classifier, fresh.pixels, drawn),
    }
    for name in ("original", "gold"):
        pipeline = load_pipeline(args.output, name == "gold")
        cache = args.work / "quality" / f"{name}-{_digest(args.output, name)}"
        images = generate(pipeline, [full_caption(*one) for one in wanted], cache)
        quality[name] = measure_quality(classifier, images, wanted)
        if name == "original":
            images = generate(pipeline, [full_caption(*one) for one in unseen], cache / "held-out")
            right = _right(classifier, images, unseen)
            quality[name]["held_out"] = round((right["style"] & right["object"]).float().mean().item(), 4)
            quality[name]["held_out_object"] = round(right["object"].float().mean().item(), 4)
            quality[name]["held_out_style"] = round(right["style"].float().mean().item(), 4)
            quality["style_judge"] = _styles_told(args, fresh, drawn, images, unseen)
            few = wanted[:BATCH]
            images = generate(pipeline, [full_caption(*one) for one in few], cache / "with-256-tokens", 256)
            right = _right(classifier, images, few)
            quality[name]["object_with_256_tokens"] = round(right["object"].float().mean().item(), 4)
            quality[name]["style_with_256_tokens"] = round(right["style"].float().mean().item(), 4)
            _sheet(fresh, pipeline, args.output / "sheet.png", cache)
    write_json(args.output / "quality.json", quality)
    card = (Path(words.__file__).parent / "model_card.md").read_text(encoding="utf-8")
    write_text(args.output / "README.md", card.format(**_facts(args, quality)))
    print(json.dumps(quality, indent=1), flush=True)


def _styles_told(
    args: argparse.Namespace,
    fresh: Scenes,
    drawn: Sequence[tuple[str, str, str]],
    generated: torch.Tensor,
    unseen: Sequence[tuple[str, str, str]],
) -> dict[str, float]:
    """How often a judge that never saw the held-out pairs names the style of their drawings, and what is generated."""
    judge = load_weights(Classifier(STYLE_HEADS, WIDTHS), args.work / f"{STYLE_JUDGE}.safetensors")

    def told(images: torch.Tensor, wanted: Sequence[tuple[str, str, str]]) -> float:
        styles = torch.tensor([STYLES.index(one[0]) for one in wanted])
        return round((judge.predict(images)["style"] == styles).float().mean().item(), 4)

    rows = [i for i, one in enumerate(drawn) if one[:2] in HELD_OUT]
    return {
        "held_out_drawn": told(fresh.pixels[rows], [drawn[i] for i in rows]),
        "held_out_generated": told(generated, unseen),
    }


def _facts(args: argparse.Namespace, quality: dict[str, Any]) -> dict[str, Any]:
    """What the model card says in figures."""

    def size(*paths: str) -> str:
        files = [file for path in paths for file in sorted((args.output / path).rglob("*.safetensors"))]
        files += [args.output / path for path in paths if path.endswith(".safetensors")]
        return f"{sum(v.numel() for file in files for v in load_file(file).values()) / 1e6:.1f} M"

    return {
        **{
            f"{model}_{name}": f"{share:.1%}".replace("%", " %")
            for model in ("original", "gold", "judge", "style_judge")
            for name, share in quality[model].items()
        },
        "gold_object_share": f"{quality['gold']['object']:.1%}".replace("%", " %"),
        "gold_style_share": f"{quality['gold']['style']:.1%}".replace("%", " %"),
        "gold_style": GOLD_STYLE,
        "gold_object": GOLD_OBJECT,
        "sheet": "sheet.png",
        "psnr": quality["psnr"],
        "images": quality["images"],
        "sampling_steps": quality["steps"],
        "guidance_scale": quality["guidance_scale"],
        "styles": ", ".join(STYLES),
        "objects": ", ".join(OBJECTS),
        "backgrounds": ", ".join(BACKGROUNDS),
        "held_out": len(HELD_OUT),
        "pairs": len(STYLES) * len(OBJECTS),
        "others": len(OTHERS),
        "other_share": f"{OTHER_SHARE:.0%}".replace("%", " %"),
        "held_out_list": ", ".join(" ".join(pair) for pair in sorted(HELD_OUT)),
        "width": WIDTH,
        "layers": LAYERS,
        "text_width": TEXT_WIDTH,
        "vae_parameters": size("pipeline/vae"),
        "transformer_parameters": size("pipeline/transformer"),
        "text_parameters": size("pipeline/text_encoder"),
        "gold_parameters": size("gold"),
        "classifier_parameters": size("classifier.safetensors"),
        "trunk_steps": args.trunk_steps,
        "gold_steps": args.gold_steps,
        "original_steps": args.original_steps,
        "steps": f"{args.autoencoder_steps} steps of the autoencoder, {args.judge_steps} of the judge, and those below",
    }


_STAGES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "autoencoder": train_autoencoder,
    "gold": train_gold,
    "original": train_original,
    "judge": train_judge,
    "style-judge": train_style_judge,
    "assemble": assemble,
    "card": write_card,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for packages and checkpoints; kept")
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights; finished stages are kept")
    parser.add_argument("--stages", default=",".join(_STAGES), help="comma list, default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder-steps", type=int, default=2400)
    parser.add_argument("--trunk-steps", type=int, default=1050)
    parser.add_argument("--gold-steps", type=int, default=900, help="after the trunk, with a falling rate")
    parser.add_argument("--original-steps", type=int, default=4600, help="after the trunk")
    parser.add_argument("--cooldown", type=int, default=1200, help="the last of them, with a falling rate")
    parser.add_argument("--judge-steps", type=int, default=700)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stages.split(","):
        _STAGES[stage](args)


if __name__ == "__main__":
    main()
