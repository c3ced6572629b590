"""Weights from trainer to rollout engines on one host: full tensors in shared-memory segments, checked by SHA-256.

A segment is a file in /dev/shm, which is POSIX shared memory on Linux, or in the temporary directory elsewhere. Its writer
holds a lock on it and removes it on release, on collection and at exit; what a killed writer left behind is found by its
missing lock and removed by the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miles_plan.backends.engine import EngineError, WeightBucket, WeightTensor

TRANSPORT = "shared_memory"
_PREFIX = "miles-plan-weights-"
_ALIGNMENT_BYTES = 64
_STALE_AFTER_S = 60.0  # a writer locks its segment well within this time of creating it


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """Which tensors go into one bucket, and which world rank of the trainer writes it."""

    index: int
    owner: int
    names: tuple[str, ...]
    last: bool


def plan_buckets(sizes_bytes: Mapping[str, int], owners: Mapping[str, int], bucket_bytes: int) -> tuple[BucketPlan, ...]:
    """Cut the tensors into buckets of at most `bucket_bytes` (a larger tensor gets its own), by owner, then in their order.

    A pure function, so all ranks agree on the one global order. ValueError when bucket_bytes is not positive.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be at least 1, got {bucket_bytes}")
    groups: list[tuple[int, list[str]]] = []
    filled = 0
    for name in sorted(sizes_bytes, key=lambda name: owners[name]):
        size = _aligned(sizes_bytes[name])
        if not groups or groups[-1][0] != owners[name] or filled + size > bucket_bytes:
            groups.append((owners[name], []))
            filled = 0
        groups[-1][1].append(name)
        filled += size
    return tuple(
        BucketPlan(index, owner, tuple(names), index == len(groups) - 1) for index, (owner, names) in enumerate(groups)
    )


class SharedMemoryWriter:
    """Owns the segments of one trainer rank until `release`. EngineError names a segment that cannot be written."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory or default_directory()
        self._segments: dict[int, list[tuple[Path, int]]] = {}
        self._finalizer = weakref.finalize(self, _remove_all, self._segments)
        remove_stale_segments(self._directory)

    def write(self, version: int, plan: BucketPlan, tensors: Sequence[tuple[str, Tensor]]) -> WeightBucket:
        """Copy full tensors, in the plan's order, into a new segment."""
        if tuple(name for name, _ in tensors) != plan.names:
            raise ValueError(f"bucket {plan.index} holds {plan.names}, got {[name for name, _ in tensors]}")
        offsets, total = [], 0
        for _, tensor in tensors:
            offsets.append(total)
            total += _aligned(_size_bytes(tensor))
        path = self._directory / f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex}"
        described = []
        for (name, tensor), offset, view in zip(tensors, offsets, self._create(version, path, offsets, total), strict=True):
            source = tensor.detach().contiguous().cpu().reshape(-1)
            view[: _size_bytes(tensor)].copy_(source.view(torch.uint8))
            described.append(_describe(name, tensor, offset, view[: _size_bytes(tensor)]))
        return WeightBucket(
            transport=TRANSPORT,
            version=version,
            index=plan.index,
            handle=str(path),
            tensors=tuple(described),
            last=plan.last,
        )

    def release(self, version: int) -> None:
        """Remove the segments of a version; readers that have them open keep them until they are done."""
        for path, descriptor in self._segments.pop(version, []):
            _remove(path, descriptor)

    def close(self) -> None:
        """Remove every segment."""
        self._finalizer()

    def _create(self, version: int, path: Path, offsets: Sequence[int], size: int) -> list[Tensor]:
        """Bytes from each offset on, in a new locked segment."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise EngineError(f"cannot create the weight segment {path}: {error.strerror}") from error
        self._segments.setdefault(version, []).append((path, descriptor))
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)  # a full /dev/shm is an error here and not a bus error later
            else:
                os.ftruncate(descriptor, size)
        except OSError as error:
            raise EngineError(f"cannot reserve {size} bytes for the weight segment {path}: {error.strerror}") from error
        whole = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
        return [whole[offset:] for offset in offsets]


def read_bucket(bucket: WeightBucket) -> Iterator[tuple[str, Tensor]]:
    """The bucket's full tensors, each after its checksum matched; they are views that live as long as they are referred to.

    EngineError names a segment that is gone or a tensor whose bytes are not those that were written.
    """
    if bucket.transport != TRANSPORT:
        raise EngineError(f"bucket {bucket.index} travels by '{bucket.transport}', this engine reads '{TRANSPORT}'")
    try:
        with open(bucket.handle, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot open the weight segment {bucket.handle} of version {bucket.version}: {error}") from error
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    for tensor in bucket.tensors:
        raw = whole[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
        if raw.numel() != tensor.size_bytes or checksum(raw) != tensor.checksum:
            raise EngineError(
                f"weight '{tensor.name}' of version {bucket.version} does not match its checksum {tensor.checksum} "
                f"in {bucket.handle}"
            )
        yield tensor.name, raw.view(getattr(torch, tensor.dtype)).view(tensor.shape)


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's bytes, first 16 hex digits."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()[:16]


def default_directory() -> Path:
    """Where segments live: memory where the system offers it, else the temporary directory."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def remove_stale_segments(directory: Path) -> int:
    """Remove segments whose writer is gone (nobody holds their lock); returns how many."""
    removed = 0
    for path in directory.glob(f"{_PREFIX}*"):
        removed += _remove_if_stale(path)
    return removed


def _remove_if_stale(path: Path) -> bool:
    try:
        if _age_s(path) < _STALE_AFTER_S:
            return False
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # removed meanwhile, or another user's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:  # its writer lives
        return False
    finally:
        os.close(descriptor)
    return True


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _remove_all(segments: dict[int, list[tuple[Path, int]]]) -> None:
    for version in list(segments):
        for path, descriptor in segments.pop(version):
            _remove(path, descriptor)


def _remove(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)
    os.close(descriptor)


def _describe(name: str, tensor: Tensor, offset: int, raw: Tensor) -> WeightTensor:
    return WeightTensor(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        offset_bytes=offset,
        size_bytes=_size_bytes(tensor),
        checksum=checksum(raw),
    )


def _size_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
