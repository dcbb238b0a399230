"""Make a model forget a style, and see what of the rest it keeps.

The bundled model's styles are its backgrounds.  For your own model put its folder or hub id in the place of `shapes`,
and your style, such as "Van Gogh" with the anchor "a painting".  Takes half a minute on a CPU.
"""

from fastunlearn import evaluate, unlearn

MODEL = "shapes"
STYLE = "striped"
ANCHOR = "plain"  # what the style becomes
PROMPTS = [("a red ring on a striped background", "forget"), ("a blue heart on a striped background", "forget")]
PROMPTS += [
    (f"a {color} {shape} on a dotted background", "keep") for color in ("red", "blue") for shape in ("ring", "heart")
]

# UCE is a closed form: it maps the style to the anchor in every text projection, in seconds, without training.
run = unlearn(MODEL, STYLE, method="uce", anchor=ANCHOR, output="style-run", evaluation_prompts="none")
print(f"the unlearned model is in {run.model}, and run.pipeline is it, loaded: {type(run.pipeline).__name__}")

# The same prompts and the same noise before and after: every difference comes from the change.
report = evaluate(MODEL, run.folder, PROMPTS, output="style-evaluation", control_pairs=4)
erasure, integrity = report.summary["erasure"], report.summary["integrity"]
print(f"images that show the style: {erasure['shown_original']:.0%} before, {erasure['shown']:.0%} after")
print(f"kept of each other image: R = {integrity['retention']:.3f}; all of it: style-evaluation/report.html")
