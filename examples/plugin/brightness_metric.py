"""A metric and a distance that another package brings.

Its package says so in pyproject.toml; `fastunlearn evaluate --metrics brightness --metric pixels ...` finds them:
    [project.entry-points."fastunlearn.metrics"]
    brightness = "brightness_metric:BRIGHTNESS"
    [project.entry-points."fastunlearn.distances"]
    pixels = "brightness_metric:PIXELS"
"""

from fastunlearn.metrics.base import MetricFactory
from fastunlearn.metrics.distances import DistanceFactory
from fastunlearn.metrics.kinds import PairedMetric


def brighter(original, unlearned):
    """How much brighter the unlearned model's images are: (B, 3, H, W) uint8 of both sides to (B,) gray levels."""
    return unlearned.float().mean(dim=(1, 2, 3)) - original.float().mean(dim=(1, 2, 3))


BRIGHTNESS = MetricFactory(
    "brightness", "mean gray levels gained", lambda device, world: PairedMetric("brightness", "pixels", brighter)
)


class Pixels:
    metric = "pixels@1"

    def distance(self, images0, images1):
        return (images0.float() - images1.float()).abs().mean(dim=(1, 2, 3)) / 255


PIXELS = DistanceFactory("pixels", "mean absolute difference", lambda trunk_weights, micro_batch_size: Pixels())
