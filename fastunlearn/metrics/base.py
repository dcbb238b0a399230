"""What a metric is, the metrics there are, and how one is loaded by its name.

A metric first turns each pair into one row of numbers (features of both images, or a distance), which can be written
down, merged and continued later, and at the end all rows into a result.  Other packages add metrics through the
entry-point group ``fastunlearn.metrics``: an entry names a :class:`MetricFactory`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from ..errors import UserError
from ..plugins import Registry, registry
from ..worlds import World


@runtime_checkable
class Metric(Protocol):
    """What an evaluation asks of a metric.

    ``name``: as results call it.  ``of``: which network or library it was made with.  ``needs_prompts``: whether
    ``measure`` reads the prompts; else they may be file names.
    """

    name: str
    of: str
    needs_prompts: bool

    def measure(self, original: torch.Tensor, unlearned: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """(B, 3, H, W) uint8 images of both sides on the CPU and B prompts to (B, F) float32 on the CPU.

        A pair's row must not depend on the other pairs.
        """

    def aggregate(self, values: npt.NDArray[np.float32], prompts: Sequence[str]) -> dict[str, Any]:
        """All rows (N, F), in the order of their keys, to results for JSON.  Raises UserError for too few."""


@dataclasses.dataclass(frozen=True)
class MetricFactory:
    """A metric before its network is loaded.

    ``summary``: one line for lists.  ``load``: (device, world) -> the metric; ``world`` is the bundled world that the
    images are of and that brings its own network, else None.  It raises UserError, in one line, where its package or
    its weights cannot be had.
    """

    name: str
    summary: str
    load: Callable[[str | torch.device, World | None], Metric]


def all_metrics() -> dict[str, MetricFactory]:
    """Every metric by name: ours, then those of installed packages that can be loaded."""
    return dict(_registry().items)


def broken_metrics() -> dict[str, str]:
    """Metrics of installed packages that cannot be loaded, by name, and why."""
    return dict(_registry().broken)


def load_metric(name: str, device: str | torch.device = "cpu", *, world: World | None = None) -> Metric:
    """A metric by name, on the network of ``world`` where it brings one, else on that of the field.

    Raises UserError, in one line, for an unknown name and where its package or its weights cannot be had.
    """
    factory = _registry().get(name)
    return _checked(factory.load(device, world if world and world.load_network else None))


def load_metrics(
    given: str | Sequence[str | Metric] | None, device: str | torch.device = "cpu", *, world: World | None = None
) -> list[Metric]:
    """Metrics by name, by names separated by commas, or as objects, in their order.

    Raises UserError like :func:`load_metric`, for an object that is no metric, and for two of one name.
    """
    asked = given.split(",") if isinstance(given, str) else list(given or ())
    words = [one.strip() if isinstance(one, str) else one for one in asked]
    metrics = [
        load_metric(one, device, world=world) if isinstance(one, str) else _checked(one) for one in words if one != ""
    ]
    names = [metric.name for metric in metrics]
    if len(set(names)) < len(names):
        raise UserError(f"`--metrics` names a metric twice, {max(names, key=names.count)}: name each once.")
    return metrics


def _checked(one: Any) -> Metric:
    """``one``, which must have the parts of a metric.  Raises UserError that names the first that it lacks."""
    if isinstance(one, Metric):
        return one
    missing = next(part for part in ("name", "of", "needs_prompts", "measure", "aggregate") if not hasattr(one, part))
    raise UserError(
        f"a {type(one).__name__} is no metric, it lacks `{missing}`: give a name or an object with the parts of "
        "fastunlearn.metrics.base.Metric."
    )


def _registry() -> Registry[MetricFactory]:
    from .clip_score import CLIP_SCORE
    from .cmmd import CMMD
    from .dreamsim import DREAMSIM
    from .fid import FID
    from .kid import KID
    from .ssim import SSIM

    ours = {metric.name: metric for metric in (FID, KID, CMMD, CLIP_SCORE, DREAMSIM, SSIM)}
    return registry(
        "metric",
        "fastunlearn.metrics",
        ours,
        lambda one: isinstance(one, MetricFactory),
        wanted="a fastunlearn.metrics.base.MetricFactory",
        command="info",
    )
