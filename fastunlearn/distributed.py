"""Processes: which one this is, how others are started on this machine, and what they must agree on.

The only reader of RANK and its like.  Processes that are started here meet through a file in a private folder and talk
over the loopback interface alone; no port of this machine's network is opened, and nothing is unpickled to meet.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    import torch

#: Names the file through which processes meet; set by who starts them here.
_STORE = "FASTUNLEARN_STORE"
#: A collective that waits longer than this ends its process: another one has stopped.
_TIMEOUT_S = 600
_STOPPED_S = 60  # how long a started process may stand still (SIGSTOP) before the others are ended
_GRACE_S = 30  # that a process has to save its state once it is asked to end
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class World:
    """``size`` processes, of which this is number ``rank``, and number ``local_rank`` on its machine.

    ``store``: the file through which they meet, where one of ours started them; None under another launcher.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: str | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            import torch

            torch.distributed.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place and on all of them."""
        if self.size > 1:
            import torch

            torch.distributed.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` is set in any process; the same answer in all of them."""
        if self.size == 1:
            return flag
        import torch

        return bool(self.sum(torch.tensor([float(flag)], device=device))[0] > 0)


ALONE = World()


def world_of_environment() -> World:
    """What a launcher (torchrun, deepspeed, ours) says in RANK, WORLD_SIZE and LOCAL_RANK.

    One process where none does: a RANK without a WORLD_SIZE above 1 is not ours to read, some clusters set it.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return ALONE
        rank = int(os.environ.get("RANK", 0))
        world = World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), os.environ.get(_STORE))
    except ValueError as error:
        raise UserError(f"the launcher's {', '.join(names)} must be whole numbers: {error}.") from error
    if not 0 <= world.rank < world.size:
        raise UserError(f"the launcher's RANK is {world.rank} of WORLD_SIZE {world.size}: it must be below it.")
    return world


def device_of(world: World, name: str | torch.device) -> torch.device:
    """This process' device: of several CUDA devices, that of its number on the machine.

    ``name``: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``.  Raises UserError where there are fewer GPUs than
    processes, and for a device that this machine lacks.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError("`--device cuda` needs a CUDA device and this machine has none. Use `--device cpu`.")
    if world.size > 1:
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {world.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}. "
                "Start fewer processes."
            )
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    return device


def join(world: World, device: torch.device) -> None:
    """Make the process group: NCCL between CUDA devices, gloo between CPUs.  A process alone makes one of its own."""
    import torch

    if torch.distributed.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {"rank": world.rank, "world_size": world.size}
    if world.size == 1:
        options["store"] = torch.distributed.HashStore()
    elif world.store is not None:
        options["store"] = torch.distributed.FileStore(world.store, world.size)
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=_TIMEOUT_S), **options)


def leave() -> None:
    """Take the process group down, if there is one."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def has_joined() -> bool:
    """Whether this process has joined a group, from where on its mistakes may be its own."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process is gone, rather than that something is wrong here."""
    signs = ("gloo", "nccl", "closed by peer", "connection reset", "connection refused", "broken pipe", "tcpstore")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def share_of_cores(num_processes: int) -> int:
    """Threads for each of so many processes on this machine, so that they do not fight for its cores."""
    return max(1, len(os.sched_getaffinity(0)) // num_processes)


def take_share_of_cores(world: World) -> None:
    """Let this process of several use no more than its share of the machine's cores, unless OMP_NUM_THREADS says how
    many: two processes with two threads each on two cores are many times as slow as with one.

    Ours and torchrun's processes are told by that variable; those of ``deepspeed`` are not.
    """
    if world.size == 1 or os.environ.get("OMP_NUM_THREADS"):
        return
    import torch

    here = (os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"))
    local_size = next((int(size) for size in here if size.isdecimal() and int(size) > 0), world.size)
    torch.set_num_threads(min(torch.get_num_threads(), share_of_cores(local_size)))


@dataclasses.dataclass
class Failure:
    """How a process ended that should not have: ``status`` is below 0 for a signal."""

    rank: int
    status: int
    standing_still: bool = False

    def __str__(self) -> str:
        if self.standing_still:
            return f"process {self.rank} stood still for {_STOPPED_S} s; the others were stopped."
        if self.status < 0:
            return f"process {self.rank} was killed by {signal.Signals(-self.status).name}; the others were stopped."
        return f"process {self.rank} ended with status {self.status}; the others were stopped."


class Processes:
    """Processes of one command on this machine.  They end when the process that started them does.

    ``arguments``: of ``fastunlearn``.  ``ranks`` of ``size`` are started; ``logs``: a rank's output, where it is not
    ours.  ``threads``: of each.  The working folder is not searched for modules.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        ranks: Sequence[int],
        size: int,
        *,
        threads: int,
        log_of: Callable[[int], Path] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fastunlearn-")  # its mode is 0700
        self._still: dict[int, float] = {}
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        command = [sys.executable, "-P", "-m", "fastunlearn", *arguments]
        common = {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": str(threads),
            _STORE: str(Path(self._folder.name) / "store"),
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            **(environment or {}),
        }
        try:
            for rank in ranks:
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                stream: IO[bytes] | None = log_of(rank).open("wb") if log_of else None
                try:
                    self._running[rank] = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=stream,
                        env=os.environ | common | own,
                        preexec_fn=_end_with_parent(),
                    )
                finally:
                    if stream is not None:
                        stream.close()
        except BaseException:
            self.stop()
            raise

    def failed(self) -> Failure | None:
        """The first process found that has failed, or that has stood still for long; None while all is well."""
        for rank, process in self._running.items():
            status = process.poll()
            if status not in (None, 0):
                return Failure(rank, status)
            # Counted by our own polls: where the whole job was suspended, nobody has stood still for long.
            self._still[rank] = self._still.get(rank, 0.0) + _POLL_S if _is_stopped(process) else 0.0
            if self._still[rank] >= _STOPPED_S:
                return Failure(rank, 0, standing_still=True)
        return None

    def is_done(self) -> bool:
        """Whether all have ended well."""
        return all(process.poll() == 0 for process in self._running.values())

    def wait(self) -> Failure | None:
        """Until all have ended.  Where one fails the others are ended too, and it is returned."""
        try:
            while not self.is_done():
                if failure := self.failed():
                    return failure
                time.sleep(_POLL_S)
            return None
        finally:
            self.stop()

    def stop(self) -> None:
        """End those that still run: they are asked first, so that they can save their state."""
        left = [process for process in self._running.values() if process.poll() is None]
        for process in left:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + _GRACE_S
        for process in left:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()


def launch(arguments: Sequence[str], num_processes: int) -> Failure | None:
    """Run ``fastunlearn ARGUMENTS`` in so many processes on this machine, until all end.

    Where one fails the others are stopped, and it is returned.  Asked to stop (Ctrl-C, SIGTERM) it asks them, waits,
    and raises KeyboardInterrupt.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS") or share_of_cores(num_processes))

    def asked(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, asked)
    processes = Processes(arguments, range(num_processes), num_processes, threads=threads)
    try:
        return processes.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_with_parent() -> Callable[[], None] | None:
    """What a new process does first: ask the system to end it when its parent ends, however that ends."""
    if not sys.platform.startswith("linux"):
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was faster
            os._exit(1)

    return prepare


def _is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Whether a signal such as SIGSTOP holds the process."""
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")
