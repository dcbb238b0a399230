"""The processes of a training: how they start, who this one is, and the few things that they must agree on."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .errors import UserError


@dataclasses.dataclass(frozen=True)
class World:
    """``size`` processes, of which this is number ``rank``, and number ``local_rank`` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place and on all of them."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` is set in any process; the same answer in all of them."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=device))[0] > 0)


ALONE = World()


def world_of_environment() -> World:
    """What a launcher (torchrun, deepspeed) says in RANK, WORLD_SIZE and LOCAL_RANK; one process where none does."""
    try:
        return World(*(int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))
    except ValueError as error:
        raise UserError(f"the launcher's RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}.") from error


def join(world: World, device: torch.device) -> None:
    """Make the process group: NCCL between CUDA devices, gloo between CPUs.  A process alone makes one of its own."""
    if torch.distributed.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {"rank": world.rank, "world_size": world.size}
    if world.size == 1:
        options["store"] = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, **options)


def leave() -> None:
    """Take the process group down, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process is gone, rather than that something is wrong here."""
    signs = ("gloo", "nccl", "closed by peer", "connection reset", "connection refused", "broken pipe", "tcpstore")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def launch(arguments: Sequence[str], num_processes: int) -> str | None:
    """Run ``fastunlearn ARGUMENTS`` in so many processes on this machine, with torchrun's elastic launcher.

    Where one of them fails the others are stopped.  Returns None if all ended well, else what there is to say beyond
    what the failed process has said itself, which may be nothing.
    """
    from torch.distributed.elastic.agent.server.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # As torchrun does, so that the processes do not fight for the cores; a user's own setting wins.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=f"fastunlearn-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "fastunlearn", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return ""
        return f"process {rank} was killed by {signal.Signals(-failure.exitcode).name}; the others were stopped."
    except SignalException:
        raise KeyboardInterrupt from None
    return None
