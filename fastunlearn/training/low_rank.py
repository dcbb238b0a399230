"""What a training of a low-rank adapter will do: which layers carry it, and what of the selection it leaves out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..models.adapters import Adapter, beyond_full_rank, import_peft, plan_adapter, put_on
from ..models.base import Model
from .config import DEFAULT_RANK, TrainConfig
from .selection import Selection


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
    def of(cls, config: TrainConfig, model: Model, names: Sequence[str], *, drops_mask: bool) -> AdapterPlan | None:
        """On the layers whose weights are among ``names``; None where no adapter is asked for.  Raises UserError."""
        if config.adapter is None:
            return None
        import_peft()
        adapter = plan_adapter(model.denoiser, names, config.rank or DEFAULT_RANK, config.lora_alpha)
        small = tuple(beyond_full_rank(model.denoiser, adapter))
        left_out = len(names) - len(adapter.layers)
        return cls(adapter, left_out, small, drops_mask, untried_rate=config.learning_rate is None)

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
