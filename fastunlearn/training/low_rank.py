"""What a training of a low-rank adapter will do: which layers carry it, and what of the selection it leaves out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..errors import UserError
from ..methods import Method
from ..models.adapters import Adapter, beyond_full_rank, import_peft, plan_adapter, put_on
from ..models.base import Model
from .config import DEFAULT_RANK, TrainConfig
from .selection import Selection


def with_default_adapter(config: TrainConfig, method: Method) -> TrainConfig:
    """The settings with the method's own adapter, where they ask for none and for no whole weights either.

    Raises UserError for settings that contradict it.
    """
    if config.adapter is None and method.adapter_rank is not None:
        refused = {
            "--save delta": config.save == "delta",
            "--mask": config.mask,
            "--mask-density": config.mask_density,
        }
        for flag, given in refused.items():
            if given:
                raise UserError(
                    f"the method {method.name} trains an adapter and leaves the weights alone. Leave `{flag}` out, or "
                    "give `--adapter none`."
                )
        return dataclasses.replace(config, adapter="lora")
    if not config.is_adapted:
        for name in ("rank", "lora_alpha"):
            if getattr(config, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"`{flag}` is of an adapter: give `--adapter lora` too, or leave it out.")
    return config


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """``left_out``: how many selected parameters are no weights of layers.  ``small``: layers of a smaller rank than
    the adapter's.  ``drops_mask``: the method would have made a mask, which is for weights.  ``untried_rate``: the
    learning rate is the method's own, chosen for weights."""

    adapter: Adapter
    left_out: int
    small: tuple[str, ...]
    drops_mask: bool
    untried_rate: bool

    @classmethod
    def of(
        cls, config: TrainConfig, method: Method, model: Model, names: Sequence[str], *, drops_mask: bool
    ) -> AdapterPlan | None:
        """On the layers whose weights are among ``names``; None where no adapter is asked for.  Raises UserError."""
        if not config.is_adapted:
            return None
        import_peft()
        rank = config.rank or method.adapter_rank or DEFAULT_RANK
        adapter = plan_adapter(model.denoiser, names, rank, config.lora_alpha)
        small = tuple(beyond_full_rank(model.denoiser, adapter))
        left_out = len(names) - len(adapter.layers)
        is_untried = config.learning_rate is None and method.adapter_rank is None
        return cls(adapter, left_out, small, drops_mask, untried_rate=is_untried)

    def begin(self, model: Model, *, seed: int, base: str, method: str, concept: str) -> Selection:
        """Put the adapter on the model, and select its tensors; ``base``: the hash of the model's files."""
        made = {"base": base, "method": method, "concept": concept}
        adapter = dataclasses.replace(self.adapter, made=made)
        return Selection.of(model.denoiser, put_on(model, adapter, seed))

    def lines(self, method: str) -> list[str]:
        """What it is, in words."""
        adapter = self.adapter
        lines = [f"adapter     of rank {adapter.rank}, alpha {adapter.alpha:g}, on {len(adapter.layers)} layers"]
        if self.left_out:
            lines.append(
                f"            {self.left_out} selected parameters are no weights of layers, and stay as they are"
            )
        if self.small:
            lines.append(
                f"            {len(self.small)} of them, such as {self.small[0]}, are of a smaller rank themselves: "
                "there it holds more numbers than the weight"
            )
        if self.untried_rate:
            lines.append("            at the learning rate that the method has for whole weights: untried on adapters")
        if self.drops_mask:
            lines.append(f"            without the mask that {method} makes by default: masks are for whole weights")
        return lines
