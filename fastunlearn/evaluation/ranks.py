"""The processes that share an evaluation: started here or by a launcher, they only meet in the output folder.

Each rank writes a journal of its own and a mark when its share is done; the first one merges.  No collective is needed.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from ..distributed import world_of_environment
from ..errors import UserError

_PARENT = "FASTUNLEARN_PARENT"  # process id of the first rank, where that one started the others


@dataclasses.dataclass
class Ranks:
    """This process' place among ``world_size``; ``launched``: a launcher such as torchrun started them all."""

    rank: int
    world_size: int
    launched: bool
    _others: dict[int, tuple[subprocess.Popen[bytes], Path]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_environment(cls, num_processes: int) -> Ranks:
        """From ``RANK`` and ``WORLD_SIZE`` as launchers set them, else the first of ``num_processes``."""
        world = world_of_environment()
        if world.size == 1:
            return cls(0, num_processes, False)
        if num_processes > 1:
            raise UserError(
                f"`--num-processes` {num_processes} within {world.size} launched processes: give one of them."
            )
        return cls(world.rank, world.size, _PARENT not in os.environ)

    def device(self, device: str) -> str:
        """The GPU of this rank where there are several."""
        if self.world_size == 1 or device == "cpu" or not torch.cuda.is_available():
            return device
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"

    def start(self, journal: Path) -> None:
        """Start the other ranks on what the journal says, unless a launcher did."""
        if self.launched or self.rank > 0:
            return
        command = [sys.executable, "-m", "fastunlearn", "evaluate", "--config", str(journal / "evaluate.yaml")]
        # As many threads as here: their number can change the last bit of a sum.
        common = {"WORLD_SIZE": str(self.world_size), _PARENT: str(os.getpid())}
        common["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        for rank in range(1, self.world_size):
            log = journal / f"{rank}.log"
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    [*command, "--num-processes", "1"],
                    stdout=stream,
                    stderr=stream,
                    stdin=subprocess.DEVNULL,
                    env=os.environ | common | own,
                )
            self._others[rank] = (process, log)

    def check(self) -> None:
        """RuntimeError where one of the others has failed."""
        parent = os.environ.get(_PARENT)
        if parent is not None and self.rank > 0 and os.getppid() != int(parent):
            raise UserError("the first rank is gone.")
        for rank, (process, log) in self._others.items():
            if process.poll() not in (None, 0):
                lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
                said = [line for line in lines if line.strip()][-1:] or [f"exit status {process.returncode}"]
                message = said[0].removeprefix("fastunlearn: ")
                raise UserError(f"rank {rank} of {self.world_size} failed: {message}")

    def done(self, journal: Path) -> None:
        """Leave the mark that this rank's share is recorded.  It stays true for as long as the journal exists."""
        self._mark(journal, self.rank).touch()

    def wait(self, journal: Path) -> None:
        """Until all ranks are done."""
        while not all(self._mark(journal, rank).exists() for rank in range(self.world_size)):
            self.check()
            time.sleep(0.05)

    def stop(self) -> None:
        """End the other ranks that were started here; what they recorded stays."""
        for process, _ in self._others.values():
            process.terminate()
        for process, _ in self._others.values():
            process.wait()

    def _mark(self, journal: Path, rank: int) -> Path:
        return journal / f"{rank}-of-{self.world_size}.done"
