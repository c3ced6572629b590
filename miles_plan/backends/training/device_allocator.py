"""How PyTorch's allocator takes a trainer's device memory: in segments that grow in place, except what other processes map.

Micro-batches differ in length, and a native segment that is too small for the next one stays reserved beside a new one. With
expandable segments (PyTorch's documentation, "CUDA semantics: memory management") what is reserved follows what is allocated.
CUDA IPC of such a segment needs the rights of a debugger over the other process, so lent memory is native.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SETTING = "expandable_segments"


def use_expandable_segments(device: str) -> None:
    """From now on this process's allocations on a GPU grow in place; nothing on a CPU."""
    if device == "cuda":
        torch._C._accelerator_setAllocatorSettings(f"{_SETTING}:True")


@contextmanager
def native_segments(device: str) -> Iterator[None]:
    """While it lasts, allocations on a GPU are ones that CUDA IPC can lend; afterwards they grow in place again."""
    if device != "cuda":
        yield
        return
    torch._C._accelerator_setAllocatorSettings(f"{_SETTING}:False")
    try:
        yield
    finally:
        use_expandable_segments(device)
