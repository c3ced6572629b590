"""How PyTorch's allocator takes a trainer's device memory: in segments that grow in place, except what other processes map.

Micro-batches differ in length, and a native segment that is too small for the next one stays reserved beside a new one. With
expandable segments (PyTorch's documentation, "CUDA semantics: memory management") what is reserved follows what is allocated.
CUDA IPC of such a segment needs the rights of a debugger over the other process, so lent memory is native.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

_SEGMENTS = "expandable_segments"
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def use_expandable_segments(device: str) -> None:
    """From now on this process's allocations on a GPU grow in place, unless the environment forbids it; nothing on a CPU."""
    _set(device, expandable=True)


@contextmanager
def native_segments(device: str) -> Iterator[None]:
    """While it lasts, allocations on a GPU are ones that CUDA IPC can lend; afterwards they are as before."""
    _set(device, expandable=False)
    try:
        yield
    finally:
        _set(device, expandable=True)


def settings(environment: Mapping[str, str], *, expandable: bool) -> str | None:
    """The allocator's settings, those of the environment kept, since PyTorch takes them all at once.

    None where the environment itself turns expandable segments off: then nothing is ever changed.
    """
    given = next((environment[name] for name in _VARIABLES if environment.get(name)), "")
    parts = [part.strip() for part in given.split(",") if part.strip()]
    asked = [part for part in parts if part.startswith(f"{_SEGMENTS}:")]
    if asked and asked[-1].lower() == f"{_SEGMENTS}:false":
        return None
    return ",".join([part for part in parts if part not in asked] + [f"{_SEGMENTS}:{expandable}"])


def _set(device: str, *, expandable: bool) -> None:
    text = settings(os.environ, expandable=expandable)
    if device == "cuda" and text is not None:
        torch._C._accelerator_setAllocatorSettings(text)
