"""Page-locked host memory of exactly the size that is asked for.

PyTorch's own (`pin_memory=True`) comes in powers of two, up to twice what is wanted, and one thread finds every page: half a
minute for the states of 2 B parameters. Here threads touch the pages and the driver locks what is there.
"""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from miles_plan.backends.engine import EngineError

TOUCHED_AT_ONCE_BYTES = 64 << 20
TOUCHING_THREADS = 8


class PinnedMemory:
    """`tensor`: uint8 [size_bytes] that a GPU copies from and to at full speed, until `close`.

    EngineError where the driver refuses to lock that much.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._whole = touched_memory(max(1, size_bytes))  # nothing cannot be locked
        self.tensor = self._whole[:size_bytes]
        status = _runtime().cudaHostRegister(self._whole.data_ptr(), self._whole.numel(), 0)
        if int(status) != 0:
            raise EngineError(f"the driver cannot lock {size_bytes} bytes of host memory: CUDA error {int(status)}")

    def close(self) -> None:
        """Give the memory back; `tensor` must not be used again. Copies from and to it are over."""
        _runtime().cudaHostUnregister(self._whole.data_ptr())
        self._whole = self.tensor = torch.empty(0, dtype=torch.uint8)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped


def touched_memory(size_bytes: int) -> Tensor:
    """uint8 [size_bytes] of zeros, at least one, whose pages exist, in huge ones where the system has them."""
    mapped = mmap.mmap(-1, size_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(mapped, dtype=torch.uint8)

    def touch(first: int) -> None:
        tensor[first : first + TOUCHED_AT_ONCE_BYTES : mmap.PAGESIZE].zero_()

    with ThreadPoolExecutor(TOUCHING_THREADS) as threads:
        list(threads.map(touch, range(0, size_bytes, TOUCHED_AT_ONCE_BYTES)))
    return tensor
