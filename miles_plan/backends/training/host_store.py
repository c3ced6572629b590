"""Where tensors wait while they are off the device: memory-mapped files for a CPU engine, pinned host memory for a GPU.

Offloading copies the bytes of the storages behind the tensors, then gives the storages' memory back; the tensors stay valid
objects and hold the same bits again after `onload`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miles_plan.backends.engine import EngineError
from miles_plan.backends.training.pinned_memory import PinnedMemory


@dataclass(frozen=True, slots=True)
class _Parked:
    """Storages of one part in the order of their bytes, and the file those are in; None: pinned memory."""

    storages: tuple[torch.UntypedStorage, ...]
    sizes_bytes: tuple[int, ...]
    file: Path | None


class HostStore:
    """Parks the parts of one engine rank below `directory`, which is created when first used and belongs to this store.

    A GPU's parts are parked in pinned memory, which stays for the part's next time: locking it takes longer than copying.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._parked: dict[str, _Parked] = {}
        self._pinned: dict[str, PinnedMemory] = {}

    @property
    def host_bytes(self) -> Mapping[str, int]:
        """Bytes parked, by part."""
        return {part: sum(parked.sizes_bytes) for part, parked in self._parked.items()}

    def is_parked(self, part: str) -> bool:
        """Whether `part` is off the device."""
        return part in self._parked

    def offload(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Park the tensors and free their memory; a no-op for a part already parked.

        EngineError names the file that could not be written or the memory that could not be locked; then nothing was freed.
        """
        if part in self._parked:
            return
        storages = tuple(_unique_storages(tensors))
        sizes = tuple(storage.nbytes() for storage in storages)
        file = None
        if any(storage.device.type == "cuda" for storage in storages):
            _copy_out(storages, sizes, self._pinned_for(part, sum(sizes)))
        else:
            file = self._write_file(part, storages, sizes)
        self._parked[part] = _Parked(storages, sizes, file)
        for storage in storages:
            storage.resize_(0)

    def onload(self, part: str) -> None:
        """Bring a part back, bit for bit; a no-op for one that is resident. EngineError names a file that is gone."""
        if part not in self._parked:
            return
        parked = self._parked[part]
        source = self._pinned[part].tensor if parked.file is None else _map_file(parked.file, sum(parked.sizes_bytes))
        start = 0
        for storage, size in zip(parked.storages, parked.sizes_bytes, strict=True):
            storage.resize_(size)
            _bytes_of(storage).copy_(source[start : start + size])
            start += size
        del self._parked[part]
        if parked.file is not None:
            parked.file.unlink(missing_ok=True)

    def close(self) -> None:
        """Forget everything parked and remove the directory."""
        self._parked.clear()
        while self._pinned:
            self._pinned.popitem()[1].close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _pinned_for(self, part: str, size_bytes: int) -> Tensor:
        """The part's pinned memory, made anew where it is too small."""
        if part in self._pinned and self._pinned[part].size_bytes < size_bytes:
            self._pinned.pop(part).close()
        if part not in self._pinned:
            self._pinned[part] = PinnedMemory(size_bytes)
        return self._pinned[part].tensor

    def _write_file(self, part: str, storages: tuple[torch.UntypedStorage, ...], sizes: tuple[int, ...]) -> Path:
        path = self._directory / f"{part}.bin"
        total = max(1, sum(sizes))  # an empty file cannot be mapped
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with open(path, "w+b") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, total)  # a full disk is an error here and not a bus error later
                else:
                    file.truncate(total)
                mapped = mmap.mmap(file.fileno(), total)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise EngineError(f"cannot park {total} bytes of '{part}' in {path}: {error.strerror}") from error
        _copy_out(storages, sizes, torch.frombuffer(mapped, dtype=torch.uint8))
        return path


def _unique_storages(tensors: Iterable[Tensor]) -> Iterable[torch.UntypedStorage]:
    seen: set[int] = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            yield storage


def _copy_out(storages: Iterable[torch.UntypedStorage], sizes: Iterable[int], target: Tensor) -> None:
    start = 0
    for storage, size in zip(storages, sizes, strict=True):
        target[start : start + size].copy_(_bytes_of(storage))
        start += size


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _map_file(path: Path, size: int) -> Tensor:
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read back {path}: {error}") from error
    if len(mapped) < size:
        raise EngineError(f"cannot read back {path}: it has {len(mapped)} bytes, {size} were parked")
    return torch.frombuffer(mapped, dtype=torch.uint8)
