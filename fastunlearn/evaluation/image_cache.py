"""The original's images, each generated once: held while needed, kept on disk if a folder is given."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .generators import Key, Source

_MAGIC = b"fastunlearn image 1\n"


class Originals:
    """Generates the images of ``plan``, the keys in the order in which they will be asked for, in full batches.

    An image is dropped when it was asked for as often as the plan names it.  ``finish`` runs the last part of a
    generating, so that it can overlap with the next one.
    """

    def __init__(
        self,
        source: Source,
        plan: Sequence[Key],
        finish: Executor,
        cache: ImageCache | None = None,
        on_generated: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._source, self._finish, self._cache, self._on_generated = source, finish, cache, on_generated
        self._uses = collections.Counter(plan)
        self._coming = collections.deque(dict.fromkeys(plan))
        self._held: dict[Key, tuple[Future[torch.Tensor], int]] = {}
        state = source.state() if cache else None
        self._prefix = json.dumps(state, sort_keys=True, default=str) if state is not None else None

    def get(self, keys: Sequence[Key]) -> Callable[[], torch.Tensor]:
        """Start what is missing of ``keys``; what is returned gives their images (N, 3, H, W) uint8."""
        for index, key in enumerate(keys):
            if key not in self._held and not self._recall(key):
                self._generate([key, *keys[index + 1 :]])
        found = [self._held[key] for key in keys]
        for key in keys:
            self._uses[key] -= 1
            if self._uses[key] <= 0:
                self._held.pop(key, None)
        return lambda: torch.stack([images.result()[index] for images, index in found])

    def _generate(self, wanted: Iterable[Key]) -> None:
        """Generate one batch: the first key, and whatever else comes soonest and is not there."""
        batch: list[Key] = []
        for key in wanted:
            if len(batch) < self._source.batch_size and key not in batch and (not batch or self._is_missing(key)):
                batch.append(key)
        ahead = 0
        while self._coming and len(batch) < self._source.batch_size:
            key = self._coming.popleft()
            if key in self._held or key in batch or self._uses[key] <= 0:
                continue
            if self._is_missing(key):
                batch.append(key)
            ahead += 1
            if ahead == 2 * self._source.batch_size:  # no further: all is held in memory
                break
        finish = self._source.start(batch)
        generated = self._finish.submit(self._finished, finish, batch)
        self._held |= {key: (generated, index) for index, key in enumerate(batch)}
        self._on_generated(len(batch))

    def _finished(self, finish: Callable[[], torch.Tensor], batch: Sequence[Key]) -> torch.Tensor:
        images = finish()
        if self._cache and self._prefix is not None:
            for key, image in zip(batch, images, strict=True):
                self._cache.store(self._name(key), image)
        return images

    def _is_missing(self, key: Key) -> bool:
        return key not in self._held and not self._recall(key)

    def _recall(self, key: Key) -> bool:
        """Whether the image was on disk; it is then held."""
        image = self._cache.load(self._name(key)) if self._cache and self._prefix is not None else None
        if image is None:
            return False
        ready: Future[torch.Tensor] = Future()
        ready.set_result(image[None])
        self._held[key] = (ready, 0)
        self._on_generated(1)
        return True

    def _name(self, key: Key) -> str:
        prompt, seed = key
        return hashlib.sha256(f"{self._prefix}\0{prompt}\0{seed}".encode()).hexdigest()


class ImageCache:
    """Images by the hash of all that decides them, in a folder that stays below ``limit_bytes``.

    An entry carries a checksum over its name and content: one that was damaged, changed or renamed is removed and
    counts as absent.  The longest unused go first.  Several processes may share the folder.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.rejected = 0  # entries that were not what they should be
        self.unwritten, self.reason = 0, ""  # images that could not be added, and why the last one could not
        if folder.exists() and not folder.is_dir():
            raise UserError(f"`--cache` {folder} is a file. Name a folder.")
        self._grown = 0  # bytes since the folder was last measured
        self._evict()

    def load(self, name: str) -> torch.Tensor | None:
        """The image (3, H, W) uint8 of that name, or None."""
        path = self._path(name)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        image = _unpack(name, content)
        if image is None:
            self.rejected += 1
            with contextlib.suppress(OSError):
                path.unlink()
        else:
            with contextlib.suppress(OSError):  # another owner's, who may let us read alone
                os.utime(path)
        return image

    def store(self, name: str, image: torch.Tensor) -> None:
        """Add an image.  What cannot be written is counted: an evaluation goes on without."""
        try:
            self._store(name, image)
        except OSError as error:
            self.unwritten += 1
            self.reason = error.strerror or str(error)

    def _store(self, name: str, image: torch.Tensor) -> None:
        path, content = self._path(name), _pack(name, image)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            # No fsync: what a power cut leaves is told by the checksum.
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            os.replace(unfinished, path)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
        self._grown += len(content)
        if self._grown > self.limit_bytes // 20:
            self._evict()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name[2:]}.image"

    def _evict(self) -> None:
        """Remove the longest unused entries once the folder is full, down to nine tenths of the limit."""
        entries = []
        for path in self.folder.glob("??/*.image"):
            try:
                status = path.stat()
            except OSError:  # another process was faster
                continue
            entries.append((status.st_mtime_ns, status.st_size, path))
        self._grown, size = 0, sum(entry[1] for entry in entries)
        # The margin is what may be added before the next measurement.
        if size <= self.limit_bytes - self.limit_bytes // 20:
            return
        for _, bytes_, path in sorted(entries):
            if size <= self.limit_bytes * 9 // 10:
                break
            path.unlink(missing_ok=True)
            size -= bytes_


def _pack(name: str, image: torch.Tensor) -> bytes:
    payload = struct.pack("<3I", *image.shape) + image.contiguous().numpy().tobytes()
    return _MAGIC + hashlib.sha256(name.encode() + payload).digest() + payload


def _unpack(name: str, content: bytes) -> torch.Tensor | None:
    start = len(_MAGIC) + 32
    checksum, payload = content[len(_MAGIC) : start], content[start:]
    if content[: len(_MAGIC)] != _MAGIC or hashlib.sha256(name.encode() + payload).digest() != checksum:
        return None
    shape: Any = struct.unpack("<3I", payload[:12])
    return torch.frombuffer(bytearray(payload[12:]), dtype=torch.uint8).view(shape)
