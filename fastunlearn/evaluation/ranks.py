"""The processes that share an evaluation or an attack: started here or by a launcher, they meet in the output folder.

Each rank writes a journal of its own and a mark when its share is done; the first one merges.  No collective is needed.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from ..distributed import Failure, Processes, World, device_of, take_share_of_cores, world_of_environment
from ..errors import UserError
from .records import Records


@dataclasses.dataclass
class Ranks:
    """This process in its ``world``; ``launched``: a launcher such as torchrun started them all."""

    world: World
    launched: bool
    _others: Processes | None = None
    _journal: Path | None = None

    @classmethod
    def from_environment(cls, num_processes: int) -> Ranks:
        """As launchers say, else the first of ``num_processes``."""
        world = world_of_environment()
        take_share_of_cores(world)
        if world.size == 1:
            return cls(World(size=num_processes), False)
        if num_processes > 1:
            raise UserError(
                f"`--num-processes` {num_processes} within {world.size} launched processes: give one of them."
            )
        return cls(world, world.store is None)

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.size

    def device(self, name: str) -> str:
        """The device of this rank; several ranks share a GPU where there are more of them."""
        if self.world.size > 1 and torch.cuda.is_available() and name != "cpu":
            local = self.world.local_rank % torch.cuda.device_count()
            return str(device_of(dataclasses.replace(self.world, local_rank=local), name))
        return name

    def start(self, records: Records) -> None:
        """Start the other ranks on what the records say, unless a launcher did."""
        if self.launched or self.rank > 0 or self.world_size == 1:
            return
        self._journal = records.folder
        self._others = Processes(
            [records.command, "--config", str(records.config_path), "--num-processes", "1"],
            range(1, self.world_size),
            self.world_size,
            threads=torch.get_num_threads(),  # as here: their number can change the last bit of a sum
            log_of=self._log,
        )

    def check(self) -> None:
        """UserError where one of the others has failed."""
        failure = self._others.failed() if self._others else None
        if failure is not None:
            raise UserError(f"rank {failure.rank} of {self.world_size} failed: {self._said(failure)}")

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
        if self._others is not None:
            self._others.stop()

    def _said(self, failure: Failure) -> str:
        lines = self._log(failure.rank).read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line for line in lines if line.strip()]
        return said[-1].removeprefix("fastunlearn: ") if said else str(failure)

    def _log(self, rank: int) -> Path:
        assert self._journal is not None
        return self._journal / f"{rank}.log"

    def _mark(self, journal: Path, rank: int) -> Path:
        return journal / f"{rank}-of-{self.world_size}.done"
