"""Facts about the device a tensor is on, asked for once."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from .toolchain import HAVE_GLUON, HAVE_TRITON

HOPPER = (9, 0)


def interpreting() -> bool:
    """True when Triton kernels run in its CPU interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_triton(device: torch.device) -> bool:
    """True when Triton kernels can be launched on tensors of this device."""
    return HAVE_TRITON and (device.type == "cuda" or interpreting())


@lru_cache(maxsize=64)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@lru_cache(maxsize=64)
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def runs_gluon(device: torch.device) -> bool:
    """True when the warp-specialised Hopper kernels run on this device."""
    return HAVE_GLUON and device.type == "cuda" and not interpreting() and _capability(_index(device)) == HOPPER


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a small number stands in for it when kernels are interpreted."""
    return _multiprocessors(_index(device)) if device.type == "cuda" else 4


def steady(x: torch.Tensor) -> torch.Tensor:
    """x itself, or a contiguous copy if its address or strides would make Triton vectorise its loads differently.

    A reduction's order follows the layout the compiler picks, and that depends on alignment. So kernels that reduce see
    either aligned rows a multiple of 16 elements apart, or plain contiguous rows; both compile to one layout a width.
    """
    aligned = x.data_ptr() % 16 == 0
    regular = all(stride % 16 == 0 for stride in x.stride()[:-1]) and x.shape[-1] % 16 == 0
    if aligned and (x.is_contiguous() or regular):
        return x
    return x.clone(memory_format=torch.contiguous_format)
