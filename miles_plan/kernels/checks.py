"""Argument checks shared by the ops: a ValueError that names the argument, what it was and what it must be."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16)


def check_float(name: str, tensor: Tensor) -> None:
    """ValueError unless the tensor is float32 or bfloat16."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32 or bfloat16, got {tensor.dtype}")


def check_integer(name: str, tensor: Tensor) -> None:
    """ValueError unless the tensor is int64 (indices)."""
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """ValueError unless the tensor has this shape; None stands for any size."""
    actual = tuple(tensor.shape)
    if len(actual) != len(shape) or any(want is not None and want != have for want, have in zip(shape, actual, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(actual)}")
