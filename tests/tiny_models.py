"""Tiny pipelines of random weights with the real classes and settings of public models; 64 px images, milliseconds.

python tests/tiny_models.py sdxl tiny-sdxl        # writes one as a folder, to try commands on
"""

import argparse
import inspect
import json
import tempfile
from pathlib import Path

import torch

from fastunlearn.models.runtime import import_diffusers

diffusers = import_diffusers()
import transformers  # noqa: E402  (only after torchvision is mended)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def scheduler(name, **settings):
    """A scheduler by its class' name without "Scheduler", on Stable Diffusion's betas."""
    kind = getattr(diffusers, f"{name}Scheduler")
    if "steps_offset" in inspect.signature(kind).parameters:
        settings = {"steps_offset": 1} | settings  # else the pipeline sets it, and warns
    return kind(**BETAS | settings)


def saved(tmp_path_factory, cases):
    """``saved(...)("sdxl")``: the folder of a case's pipeline, built and written when it is first asked for."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("model")
            build(cases[name]).save_pretrained(folders[name])
        return folders[name]

    return folder


def pndm(**settings):
    """What Stable Diffusion 1.5 ships."""
    return scheduler("PNDM", skip_prk_steps=True, set_alpha_to_one=False, **settings)


def ddim(**settings):
    return scheduler("DDIM", **{"clip_sample": False, "set_alpha_to_one": False} | settings)


def euler(**settings):
    return scheduler("EulerDiscrete", **{"timestep_spacing": "leading"} | settings)


def clip_tokenizer(pad="<|endoftext|>"):
    """One token per byte, as CLIP's tokenizer has them, without merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + n) for n in range(256 - len(printable))]
    characters = [chr(byte) for byte in printable] + others
    words = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    settings |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
        return transformers.CLIPTokenizer.from_pretrained(folder)


def clip_text(projection=None, layers=3, activation="quick_gelu", width=32):
    size = len(clip_tokenizer())
    config = transformers.CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=projection or 32,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=1,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def vae(**settings):
    base = {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 16, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "sample_size": 64,
    }
    return diffusers.AutoencoderKL(**base | settings)


def unet(**settings):
    base = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    }
    return diffusers.UNet2DConditionModel(**base | settings)


def sd1(sampler=None, *, with_checker=False, **settings):
    checker = safety_checker() if with_checker else None
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet(**settings),
        scheduler=sampler or pndm(),
        safety_checker=checker,
        feature_extractor=transformers.CLIPImageProcessor() if with_checker else None,
        requires_safety_checker=with_checker,
    )


def safety_checker():
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**common, "image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config={**common, "vocab_size": 64}, vision_config=vision, projection_dim=16)
    return StableDiffusionSafetyChecker(config)


def sd2(sampler=None):
    """OpenCLIP's text tower with a layer less, linear projections, heads counted by block; v-prediction."""
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_text(layers=2, activation="gelu"),
        tokenizer=clip_tokenizer(pad="!"),
        unet=unet(use_linear_projection=True, attention_head_dim=[2, 4]),
        scheduler=sampler or ddim(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(sampler=None, *, zeros=True, decoder=None, width=32):
    """``width``: of the second text encoder, which in real ones is the wider."""
    network = unet(
        use_linear_projection=True,
        attention_head_dim=[2, 4],
        transformer_layers_per_block=[1, 2],
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=32 + width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=decoder or vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(projection=32, activation="gelu", width=width),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad="!"),
        unet=network,
        scheduler=sampler or euler(),
        force_zeros_for_empty_prompt=zeros,
    )


def playground():
    """Playground v2.5: XL with an EDM sampler and a VAE whose latents have a mean and a spread."""
    sampler = diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    mean, spread = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
    return sdxl(sampler, decoder=vae(scaling_factor=0.5, latents_mean=mean, latents_std=spread))


def cosxl():
    return sdxl(
        diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction")
    )


def t5_tokenizer(limit=512):
    """One token per character and an end mark."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((chr(c), -3.0) for c in [*range(33, 127), 0x2581])]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
    return transformers.T5TokenizerFast(tokenizer_object=tokenizer, model_max_length=limit, **marks)


def t5(kind="T5", **settings):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": len(t5_tokenizer())}
    config = getattr(transformers, f"{kind}Config")(**sizes | settings)
    return getattr(transformers, f"{kind}EncoderModel")(config)


def gemma():
    config = transformers.Gemma2Config(
        vocab_size=len(t5_tokenizer()),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return transformers.Gemma2Model(config)


def flow(**settings):
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def flow_vae(**settings):
    """With 16 channels, and a shift of the latents."""
    return vae(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **settings)


def pixart(*, alpha=False):
    """PixArt-Sigma or Alpha: a transformer that also predicts a variance, and a T5 encoder."""
    network = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=24,
        use_additional_conditions=False,
    )
    return (diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline)(
        transformer=network,
        vae=vae(scaling_factor=0.13025),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
        text_encoder=t5(feed_forward_proj="gated-gelu"),
        tokenizer=t5_tokenizer(120 if alpha else 300),
    )


def sd3(sampler=None, *, with_t5=True, **settings):
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        **settings,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=network,
        scheduler=sampler or flow(shift=3.0),
        vae=flow_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip_text(projection=32),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projection=32, activation="gelu"),
        tokenizer_2=clip_tokenizer(pad="!"),
        text_encoder_3=t5(d_model=64) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def sd35(sampler=None):
    """Medium: normed queries and keys, and a second attention of the image, which is called attn2."""
    return sd3(sampler, qk_norm="rms_norm", dual_attention_layers=(0,))


def dynamic():
    """What FLUX.1 dev ships."""
    return flow(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def flux(sampler=None, *, guidance=True):
    network = diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    network.register_to_config(sample_size=8)
    return diffusers.FluxPipeline(
        transformer=network,
        scheduler=sampler or dynamic(),
        vae=flow_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


def sana(sampler=None):
    """With the sampler that it ships: DPM-Solver over a flow."""
    network = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=16,
    )
    blocks = {f"{side}_block_types": ("ResBlock", "EfficientViTBlock") for side in ("encoder", "decoder")}
    decoder = diffusers.AutoencoderDC(
        **blocks,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    dpm = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return diffusers.SanaPipeline(
        transformer=network,
        vae=decoder,
        scheduler=sampler or diffusers.DPMSolverMultistepScheduler(**dpm),
        text_encoder=gemma(),
        tokenizer=t5_tokenizer(),
    )


def lumina2(sampler=None):
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 128, 128),
        cap_feat_dim=8,
    )
    return diffusers.Lumina2Pipeline(
        transformer=network,
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=sampler or flow(shift=6.0),
        text_encoder=gemma(),
        tokenizer=t5_tokenizer(),
    )


def auraflow():
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=16,
    )
    # Untrained gates are nearly shut: opened, so that the text changes the image.
    torch.nn.init.normal_(network.joint_transformer_blocks[0].norm1.linear.weight, std=3.0)
    return diffusers.AuraFlowPipeline(
        transformer=network,
        vae=vae(scaling_factor=0.13025),
        scheduler=flow(shift=1.73),
        text_encoder=t5("UMT5"),
        tokenizer=t5_tokenizer(),
    )


def chat_tokenizer():
    """Characters, in a chat that is its one message."""
    tokenizer = t5_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<user>{{ message['content'] }}</user>{% endfor %}"
    return tokenizer


def qwen_image():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    text = {**sizes, "num_key_value_heads": 2, "vocab_size": len(t5_tokenizer()), "rope_parameters": rope}
    reader = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
    network = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    network.register_to_config(sample_size=16)
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.5, 2.0, 0.8, 1.0],
    )
    return diffusers.QwenImagePipeline(
        transformer=network, vae=decoder, scheduler=dynamic(), text_encoder=reader, tokenizer=t5_tokenizer()
    )


def z_image():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    reader = transformers.Qwen3Model(
        transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=len(t5_tokenizer()))
    )
    network = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],
    )
    network.register_to_config(sample_size=8)
    return diffusers.ZImagePipeline(
        transformer=network,
        vae=flow_vae(scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=flow(shift=3.0),
        text_encoder=reader,
        tokenizer=chat_tokenizer(),
    )


def build(make, seed=0):
    """The pipeline of ``make()`` with the weights of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def main(arguments=None):
    makers = (sd1, sd2, sdxl, pixart, sd3, flux, sana, lumina2, auraflow, qwen_image, z_image)
    names = {make.__name__: make for make in makers}
    parser = argparse.ArgumentParser(description="Writes a tiny pipeline of random weights: what it draws is noise.")
    parser.add_argument("name", choices=names)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(arguments)
    if args.folder.exists():
        parser.error(f"{args.folder} exists: name a new folder")
    build(names[args.name]).save_pretrained(args.folder)


if __name__ == "__main__":
    main()
