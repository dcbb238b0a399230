"""What to forget, what takes its place, what to keep: from the user, else from the bundled world."""

from __future__ import annotations

import random

from .. import prompts
from ..errors import UserError
from ..methods import Method
from ..methods.recipe import Concept, Defaults
from ..models.base import Model
from .config import MaskConfig, TrainConfig


def make_concept(config: TrainConfig, method: Method, model: Model, settings: Defaults) -> Concept:
    """What the method is told.  Raises UserError for prompts that contradict each other or that the method lacks."""
    word = config.forget.strip()
    forget = forget_prompts(config, model, alone=method.concept_alone)
    if config.retain_prompts:
        retain = prompts.parse_prompts(config.retain_prompts)
    else:
        retain = model.world.prompts_to_train(word)[1] if model.world else []
    prompts.check_disjoint(forget, retain)
    if method.needs_retain and not retain:
        raise UserError(
            f"the method {method.name} needs retain prompts: give `--retain-prompts` a FILE or 'TEXT;TEXT'."
        )
    anchor = config.anchor
    if anchor is not None and method.anchor == "none":
        raise UserError(f"the method {method.name} takes no `--anchor`. Leave it out.")
    if anchor is None and method.anchor == "needed":
        anchor = model.world.anchor(word) if model.world else ""
    anchors = {}
    if anchor is not None:
        choices = [text.strip() for text in anchor.split(";") if text.strip()] or [""]
        draw = random.Random(config.seed)
        anchors = {prompt: prompts.substitute(prompt, word, draw.choice(choices)) for prompt in forget}
    same = [prompt for prompt, replaced in anchors.items() if replaced.lower() == prompt.lower()]
    if same:
        raise UserError(f"`--anchor` {anchor!r} leaves the forget prompt {same[0]!r} as it is. Name something else.")
    encode = lambda given: model.encode(given).of(given)  # noqa: E731 - a row for each prompt, repeats included
    return Concept(anchor, tuple(forget), anchors, tuple(retain), settings, encode)


def forget_prompts(config: TrainConfig | MaskConfig, model: Model, *, alone: bool = False) -> list[str]:
    """The user's prompts that show the concept, else the bundled world's, else, or if ``alone``, the bare word."""
    word = config.forget.strip()
    if config.forget_prompts:
        forget = prompts.parse_prompts(config.forget_prompts)
    else:
        own = model.world.prompts_to_train(word)[0] if model.world else []  # refuses a word it does not know
        forget = [word] if alone or not own else own
    for prompt in forget:
        tokens = model.count_tokens(prompt)
        if tokens == 0:
            raise UserError(f"the tokenizer turns the forget prompt {prompt!r} into nothing. Use other words.")
        if tokens > model.max_tokens:
            raise UserError(
                f"the forget prompt {prompt!r} has {tokens} tokens and the model reads {model.max_tokens}. Shorten it."
            )
    return forget
