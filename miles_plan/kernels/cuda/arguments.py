"""Checks of what callers pass: each raises a ValueError that names the argument and says what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def require_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """`tensor` must have one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} has dtype {_names([tensor.dtype])}; allowed: {_names(allowed)}")


def require_dims(name: str, tensor: torch.Tensor, dims: int, meaning: str) -> None:
    """`tensor` must have `dims` dimensions, which `meaning` spells out, such as "[tokens, K]"."""
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; allowed: {dims} dimensions, {meaning}")


def require_shape(name: str, tensor: torch.Tensor, shape: Sequence[int], meaning: str) -> None:
    """`tensor` must have exactly this shape, which `meaning` spells out."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; allowed: {meaning} = {list(shape)}")


def require_size(name: str, size: int, allowed: Sequence[int]) -> None:
    """An extent that a kernel is built for must be one of a few."""
    if size not in allowed:
        raise ValueError(f"{name} is {size}; allowed: {', '.join(map(str, allowed))}")


def require_contiguous_rows(name: str, tensor: torch.Tensor) -> None:
    """The last dimension must be laid out without gaps; earlier ones may have any stride."""
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; allowed: 1 (call .contiguous() first)")


def require_contiguous(name: str, tensor: torch.Tensor) -> None:
    """The tensor must be contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}; allowed: contiguous (call .contiguous() first)")


def require_same_device(**tensors: torch.Tensor | None) -> torch.device:
    """All tensors given must live on one device, which is returned."""
    first_name, first = next((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: {first.device}, where {first_name} is")
    return first.device


def require_range(name: str, value: float, low: float, high: float, meaning: str = "") -> None:
    """A number must lie in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; allowed: {low} to {high}{f' ({meaning})' if meaning else ''}")
