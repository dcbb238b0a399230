"""What `fastunlearn info` tells: versions, devices, what can run here, and what to install for what."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from typing import Any

from .console import terminal

PACKAGES = ("fastunlearn", "torch", "triton", "diffusers", "transformers", "lpips", "deepspeed", "xformers")
LIBRARIES = ("clean-fid", "torchmetrics", "open_clip_torch", "dreamsim")
#: extra -> what it is for, of those that users of the engine install.
EXTRAS = {
    "lora": "low-rank adapters: `train --adapter lora`, `export`",
    "deepspeed": "several processes: `train --deepspeed`",
    "judges": "who says what real images show: `--judge clip`, `imagenet`, `nsfw`",
    "metrics": "metrics of the field: `--metrics fid,kid,cmmd,clip-score,ssim`",
    "dreamsim": "the metric of that name: `--metrics dreamsim`",
    "xformers": "another attention: `--attention xformers`",
}


def facts() -> dict[str, Any]:
    """Everything that `info` tells, as JSON can hold it."""
    import torch
    from fastunlearn_kernels.launch import describe

    from ..judges import all_judges, broken_judges
    from ..methods import all_methods
    from ..metrics.base import all_metrics, broken_metrics
    from ..metrics.distances import all_distances, broken_distances
    from ..models.runtime import import_diffusers

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    import_diffusers()
    return {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": [*devices, f"cpu, {torch.get_num_threads()} threads"],
        "kernels": describe(),
        "metric": {one.name: one.summary for one in all_distances().values()},
        "metrics": {one.name: one.summary for one in all_metrics().values()},
        "libraries": {name: _version(name) for name in LIBRARIES},
        "methods": list(all_methods()),
        "judges": list(all_judges()),
        "broken": {
            "metric": dict(broken_distances()),
            "metrics": dict(broken_metrics()),
            "judges": broken_judges(),
        },
        "extras": {name: {"for": why, "missing": _missing(name)} for name, why in EXTRAS.items()},
    }


def say(told: dict[str, Any]) -> None:
    """Print it, a line each, under the name of the flag that takes what is listed."""
    out = terminal(soft_wrap=True)

    def line(title: str, text: str) -> None:
        out.print(f"{title:13} {text}")

    line("python", told["python"])
    for name, version in told["packages"].items():
        line(name, version or "not installed")
    for device in told["devices"]:
        line("device", device)
    for device, runs in told["kernels"].items():
        line("kernels", f"{device}: {runs}")
    for title in ("metric", "metrics"):
        for name, summary in told[title].items():
            line(title, f"{name:14} {summary}")
    line("libraries", ", ".join(f"{name} {version or 'not installed'}" for name, version in told["libraries"].items()))
    line("methods", ", ".join(told["methods"]))
    line("judges", ", ".join(told["judges"]))
    for title, broken in told["broken"].items():
        for name, why in broken.items():
            line(title, f"{name}: cannot be loaded ({why})")
    for name, extra in told["extras"].items():
        how = f"pip install 'fastunlearn[{name}]'" if extra["missing"] else "is here"
        line("for", f"{extra['for']}: {how}")


def _missing(extra: str) -> list[str]:
    """The packages of one of our extras that are not installed."""
    asked = re.compile(rf"([\w.-]+).*;.*extra == ['\"]{extra}['\"]")
    found = [asked.match(one) for one in importlib.metadata.requires("fastunlearn") or ()]
    return [one[1] for one in found if one and _version(one[1]) is None]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
