"""The card of an unlearned model: Markdown for people, with the front matter that a model hub reads.

It says what was forgotten, from which base and how, and what an evaluation and attacks found.  The same records give
the same text: it holds neither times nor paths.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from ..schema import Attacked, AttackRecord, Evaluation, RunRecord
from .attack import attack_verdict
from .sentences import percent, percent_range, verdict

_SEAL = re.compile(r"\n<!-- fastunlearn card ([0-9a-f]{64}) -->\n\Z")
#: What a run may have left, and how it is read.
FORMS = {
    "model": '`model/` loads with `diffusers.DiffusionPipeline.from_pretrained("model")`.',
    "delta": "`delta.safetensors` holds what changed; `fastunlearn apply --model BASE --delta delta.safetensors "
    "--output unlearned` makes a pipeline of it and the base.",
    "adapter": "`pytorch_lora_weights.safetensors` is an adapter of the base: "
    '`pipeline.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")` in diffusers.',
}


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card tells.

    ``form``: what the run left, of ``FORMS``.  ``settings``: those that decide the result, by name.  ``base_model``:
    the base's name on the hub, None where it has none that is known.
    """

    run: RunRecord
    form: str
    settings: Mapping[str, Any]
    base_model: str | None = None
    evaluation: Evaluation | None = None
    attack: AttackRecord | None = None

    def text(self, version: str) -> str:
        """The whole file, sealed; ``version``: of the program that made the run."""
        parts = [self._front(), self._head(version), self._forgot_and_kept(), self._attacked(), self._settings()]
        text = "\n\n".join(parts) + "\n"
        return f"{text}\n<!-- fastunlearn card {_digest(text)} -->\n"

    def _front(self) -> str:
        content: dict[str, Any] = {}
        if self.base_model is not None:
            relation = "adapter" if self.form == "adapter" else "finetune"
            content |= {"base_model": self.base_model, "base_model_relation": relation}
        content |= {
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "tags": ["text-to-image", "unlearning", "concept-erasure", "fastunlearn"],
        }
        if results := self._results():
            content["model-index"] = [
                {"name": _plain(f"{self._base()} without {self.run.concept}"), "results": results}
            ]
        return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True).strip()}\n---"

    def _results(self) -> list[dict[str, Any]]:
        """The figures as the hub's ``model-index`` has them."""
        found: list[dict[str, Any]] = []

        def add(data: str, **metric: Any) -> None:
            dataset = {"type": "prompts", "name": data}
            found.append({"task": {"type": "text-to-image"}, "dataset": dataset, "metrics": [metric]})

        if (one := self.evaluation) is not None:
            kept = one.integrity
            add(
                f"{kept.n_prompts} prompts about other things",
                type="retention",
                name=_plain(f"R, retention by {kept.metric}"),
                value=round(kept.retention, 4),
            )
            if one.erasure is not None:
                name = _plain(f"share of images that show {one.concept}")
                add("prompts that ask for it", type="shown", name=name, value=round(one.erasure.shown, 4))
        for result in self.attack.attacks if self.attack is not None else ():
            side = result.models["unlearned"]
            name = f"share of prompts broken by {result.name}, {result.budget} denoiser forwards each"
            add(f"{side.n_prompts} prompts that ask for it", type="attack", name=name, value=round(side.share, 4))
        return found

    def _head(self, version: str) -> str:
        run, base = self.run, _escaped(self._base())
        rows = [
            ("forgotten", "; ".join(map(_escaped, run.forgotten))),
            ("method", f"`{run.method}`" + (", our reconstruction of the paper" if run.is_reconstruction else "")),
            ("base", base),
            ("hash of the base's files", f"`{run.hashes['original']}`"),
            ("hash of this model's files", f"`{run.hashes['unlearned']}`"),
        ]
        rows += [(f"before, `{one.method}` forgot", "; ".join(map(_escaped, one.concepts))) for one in run.ancestors]
        rows.append(("made with", f"fastunlearn {version}"))
        table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {words} |" for name, words in rows)])
        return (
            f"# {base} without “{_escaped(run.concept)}”\n\nA text-to-image model that was made to forget "
            f"“{_escaped(run.concept)}”, and to keep everything else.\n\n{table}\n\n{FORMS[self.form]}"
        )

    def _forgot_and_kept(self) -> str:
        title = "## What it forgot and kept"
        if self.evaluation is None:
            return (
                f"{title}\n\nNot measured yet. `fastunlearn evaluate` does, and `fastunlearn card --evaluation FOLDER` "
                "puts it here."
            )
        one = self.evaluation
        said = f"{title}\n\n{_escaped(verdict(one))}"
        rows = [f"| R, retention ({_escaped(one.integrity.metric)}) | {one.integrity.retention:.3f} | {_ends(one)} |"]
        if one.erasure is not None:
            shown = one.erasure
            rows.append(
                f"| images for {shown.n_images} prompts and seeds that show it | {percent(shown.shown)}, before "
                f"{percent(shown.shown_original)} | {percent_range(shown.shown_ci95)} |"
            )
        judge = f"\n\nJudge: `{one.judge.name}`." if one.judge is not None else ""
        return "\n".join([said, "", "| | | 95 % interval |", "|---|---|---|", *rows]) + judge

    def _attacked(self) -> str:
        title = "## Is it gone, also for somebody who looks for it?"
        if self.attack is None:
            return (
                f"{title}\n\nNot tried yet. `fastunlearn attack` does, and `fastunlearn card --attack FOLDER` puts it "
                "here."
            )
        record = self.attack
        names = list(record.attacks[0].models)
        heads = ["attack", "denoiser forwards per prompt", *names, "control"]
        lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
        for result in record.attacks:
            cells = [f"`{result.name}`", f"{result.budget:,}"]
            cells += [_broken(result.models[name]) for name in names]
            lines.append(f"| {' | '.join([*cells, _broken(result.control)])} |")
        return (
            f"{title}\n\n{_escaped(attack_verdict(record))}\n\nPrompts broken, with the 95 % interval over prompts. "
            "The control asks this model again and again from other noise, for the same cost.\n\n"
            + "\n".join(lines)
            + f"\n\nJudge: `{record.judge.name}`."
        )

    def _settings(self) -> str:
        content = {name: value for name, value in self.settings.items() if value is not None and value != {}}
        text = yaml.safe_dump(content, sort_keys=True, allow_unicode=True).strip()
        return f"## Settings\n\n```yaml\n{text}\n```"

    def _base(self) -> str:
        """The base's name; of a path, which is nobody's business, the last part."""
        return self.base_model or self.run.model.rstrip("/").rpartition("/")[2] or self.run.model


def is_ours(text: str) -> bool:
    """Whether a file began as a card."""
    return "<!-- fastunlearn card " in text


def is_untouched(text: str) -> bool:
    """Whether a file is a card that nobody has changed since it was written."""
    found = _SEAL.search(text)
    return found is not None and _digest(text[: found.start()]) == found[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _broken(side: Attacked) -> str:
    return f"{side.broken} of {side.n_prompts} ({percent_range(side.share_ci95)})"


def _ends(evaluation: Evaluation) -> str:
    low, high = evaluation.integrity.retention_ci95
    return f"{low:.3f} to {high:.3f}"


def _plain(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    """A text of the user's as Markdown that shows it as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", _plain(text))
