"""Judge a model that fastunlearn did not make: a function, a loaded pipeline, two folders of images.

Here the unlearned model is the bundled gold reference, which was trained without any star.  Takes a minute on a CPU.
"""

from pathlib import Path

import torch
from PIL import Image

from fastunlearn import EvaluateImagesConfig, evaluate, evaluate_images, load_model

PROMPTS = [("a red star on a plain background", "forget"), ("a blue star on a striped background", "forget")]
PROMPTS += [(f"a {color} ring on a plain background", "keep") for color in ("red", "blue", "green", "yellow")]
before, after = (load_model(name, "cpu").pipeline for name in ("shapes", "shapes-gold-star"))
for pipeline in (before, after):
    pipeline.set_progress_bar_config(disable=True)

# A loaded diffusers pipeline stands wherever a name does.
report = evaluate(before, after, PROMPTS, forget="star", device="cpu", control_pairs=4)
print(f"pipelines: R = {report.summary['integrity']['retention']:.3f}")


# So does any function from prompts and noise (B, C, H, W) to images (B, 3, H, W) uint8: another library, a service.
def drawn_by(pipeline):
    def draw(prompts, noise):
        images = pipeline(prompts, latents=noise, num_inference_steps=20, guidance_scale=3.0, output_type="pt").images
        return (255 * images).round().to(torch.uint8)

    return draw


report = evaluate(drawn_by(before), drawn_by(after), PROMPTS, noise_shape=(8, 8, 8), metric="shapes", control_pairs=4)
print(f"functions: distance {report.summary['integrity']['mean']:.4f}")
report.html("function-report.html")

# Two folders of images that are there already: pairs are files of one name.
for folder, result in (("before", "original"), ("after", "unlearned")):
    Path(folder).mkdir(exist_ok=True)
    images = drawn_by({"original": before, "unlearned": after}[result])(
        [prompt for prompt, _ in PROMPTS],
        torch.randn(len(PROMPTS), 8, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{folder}/{number}.png")
settings = EvaluateImagesConfig(
    original_images="before", unlearned_images="after", output="folders", metric="shapes", overwrite=True
)
print(f"folders: distance {evaluate_images(settings).integrity.mean:.4f}; pair by pair: folders/report.html")
