"""The settings of `attack`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..config import at_least, expand_home, setting
from ..errors import UserError

ATTACKS = "seeds,embedding,completion,prompts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """What `attack` does."""

    original: str = setting("`shapes`, `gallery`, a diffusers folder, or a hub id", path=True)
    unlearned: str = setting("the unlearned pipeline: a run's folder, its model/ folder, or a name", path=True)
    output: str = setting("folder for the records and the report", path=True)
    concept: str | None = setting("what to look for; default: what the unlearned run's record says", None)
    gold: str | None = setting("a model that never saw the concept, as a reference", None, path=True)
    placebo: str | None = setting("the pipeline of the same training without the forgetting part", None, path=True)
    judge: str | None = setting(
        "who says whether an image shows the concept: NAME or NAME:OPTION; default: the bundled model's", None
    )
    attacks: str = setting("NAME or NAME:OPTION, separated by commas (`fastunlearn attacks` lists them)", ATTACKS)
    prompts: str | None = setting(
        "FILE or TEXT;TEXT that ask for the concept; of a file with groups those of `forget...`; the others are the "
        "kinds of the attack `prompts`; default: the bundled model's, else made from templates",
        None,
    )
    max_prompts: int = setting("prompts that are attacked, evenly of all", 16)
    unrelated: str | None = setting(
        "FILE or TEXT;TEXT about other things, for `relearn:unrelated`; default: the bundled model's", None
    )
    budget: int | None = setting(
        "denoiser forwards per prompt, for each attack and model alike; default: each attack's own", None
    )
    evaluation: str | None = setting(
        "folder of the model's evaluation, to show both on one page; default: the unlearned run's", None, path=True
    )
    batch_size: int = setting("images per forward; a part of the result's definition", 32)
    num_inference_steps: int = setting("sampler steps", 20)
    guidance_scale: float = setting("classifier-free guidance; 0 or 1: none", 3.0)
    seed: int = setting("of the original's pictures and of what is drawn from them", 0)
    device: Literal["auto", "cpu", "cuda"] = setting("auto takes a GPU where there is one", "auto")
    num_processes: int = setting("processes that share the attempts; with several GPUs one each", 1)
    dry_run: bool = setting("print what it would cost, and stop", False)
    resume: bool = setting("continue the unfinished attack in the output folder", False)
    overwrite: bool = setting("replace an earlier attack in the output folder", False)

    def __post_init__(self) -> None:
        expand_home(self)
        at_least(self, 1, "batch_size", "num_inference_steps", "num_processes", "budget")
        at_least(self, 2, "max_prompts")
        at_least(self, 0, "guidance_scale", "seed")
        if self.concept is not None and not self.concept.strip():
            raise UserError("`--concept` is empty: name what to look for.")
        if self.resume and self.overwrite:
            raise UserError("`--resume` continues an attack and `--overwrite` replaces it: give one of them.")
