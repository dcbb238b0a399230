"""What computes attention, each backend against torch's own, on networks of real widths: one forward, bfloat16.

Needs a CUDA device; a backend whose library is missing is skipped with the reason.  Before it is measured its result is
compared with torch's own.

    python -m pytest benchmarks/bench_attention.py -m gpu --benchmark-enable
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastunlearn.errors import UserError
from fastunlearn.models.attention import can_compute, set_attention
from fastunlearn.models.runtime import import_diffusers

Made = tuple[Any, dict[str, tuple[int, ...]], dict[str, torch.Tensor]]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def unet() -> Made:
    """Stable Diffusion 1.5's, at 512 px, and its inputs."""
    network = import_diffusers().UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    inputs = {"sample": (4, 4, 64, 64), "encoder_hidden_states": (4, 77, 768)}
    return network, inputs, {"timestep": torch.tensor(500)}


def transformer() -> Made:
    """Two double and four single blocks of FLUX.1, at 1024 px, and their inputs."""
    network = import_diffusers().FluxTransformer2DModel(num_layers=2, num_single_layers=4, guidance_embeds=True)
    inputs = {"hidden_states": (1, 4096, 64), "encoder_hidden_states": (1, 512, 4096), "pooled_projections": (1, 768)}
    places = torch.cartesian_prod(torch.arange(1), torch.arange(64), torch.arange(64)).float()
    others = {"img_ids": places, "txt_ids": torch.zeros(512, 3), "timestep": torch.tensor([0.5])}
    return network, inputs, others | {"guidance": torch.tensor([3.5])}


@pytest.mark.parametrize("backend", ["native", "xformers", "flash"])
@pytest.mark.parametrize("make", [unet, transformer])
def test_forward(benchmark: Any, make: Callable[[], Made], backend: str) -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        network, shapes, others = make()
        inputs = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    network = network.to(torch.bfloat16).eval()
    inputs |= {name: value.to("cuda") for name, value in others.items()}
    if backend != "native" and not can_compute(network, backend):
        pytest.skip(f"{backend} cannot compute the layers of {type(network).__name__}")

    @torch.no_grad()
    def forward() -> torch.Tensor:
        output: torch.Tensor = network(**inputs, return_dict=False)[0]
        torch.cuda.synchronize()
        return output

    set_attention(network, "native", make.__name__)
    wanted = forward().float()
    try:
        set_attention(network, backend, make.__name__)
    except UserError as error:
        pytest.skip(str(error))
    assert (benchmark(forward).float() - wanted).norm() < 0.02 * wanted.norm()
