"""Weights in a GPU's memory, lent to another process on the same host: handles, checksums that the GPU computes, no copy.

The handle is what torch's own CUDA IPC makes (`torch.multiprocessing.reductions`), with the device named by its UUID: the two
processes may number the GPUs differently. The lender must keep the tensor until the borrower has let go of it.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from miles_plan.backends.engine import WeightTensor

_DEVICE_ARGUMENT = 6  # of `torch.multiprocessing.reductions.rebuild_cuda_tensor`
_CHUNK_WORDS = 1 << 22
_MULTIPLIER = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed word: the golden ratio's odd 64-bit multiple


def lend(tensor: Tensor) -> str:
    """A handle to a CUDA tensor for other processes of this host, as text."""
    import torch.multiprocessing.reductions as reductions

    if not tensor.is_cuda:
        raise ValueError(f"only CUDA tensors can be lent, got one on {tensor.device}")
    untyped: Any = reductions  # its functions carry no annotations
    function, arguments = untyped.reduce_tensor(tensor)
    uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
    named = (*arguments[:_DEVICE_ARGUMENT], uuid, *arguments[_DEVICE_ARGUMENT + 1 :])
    return base64.b64encode(pickle.dumps((function, named))).decode("ascii")


class Lent:
    """Stands for a lent tensor inside a pickle: whoever loads the pickle has the tensor itself, mapped from its owner."""

    def __init__(self, handle: str) -> None:
        """`handle`: what `lend` returned."""
        self._function, self._arguments = pickle.loads(base64.b64decode(handle))

    def __reduce__(self) -> tuple[Any, ...]:
        """How torch rebuilds it."""
        return self._function, self._arguments


class Nothing:
    """Stands for a tensor that nobody looks at. A pickled CPU tensor would not do: Megatron-core replaces torch's function that
    loads one by its own, which SGLang's unpickler refuses."""

    def __reduce__(self) -> tuple[Any, ...]:
        """One element, whatever it is."""
        return torch.Tensor, (1,)


def view_of(data: Tensor, tensor: WeightTensor) -> Tensor:
    """A tensor of a bucket, without a copy. data: uint8 [bucket]."""
    raw = data[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
    return raw.view(getattr(torch, tensor.dtype)).view(tensor.shape)


def packed(data: Tensor, tensors: Sequence[WeightTensor]) -> Tensor:
    """The bucket without gaps between its tensors, as SGLang's FlattenedTensorBucket has it; itself where there are none."""
    if sum(each.size_bytes for each in tensors) == data.numel():
        return data
    return torch.cat([data[each.offset_bytes : each.offset_bytes + each.size_bytes] for each in tensors])


def with_checksums(data: Tensor, tensors: Sequence[WeightTensor]) -> tuple[WeightTensor, ...]:
    """The tensors of a bucket, each with the checksum of its bytes."""
    found = checksums(data, tensors)
    return tuple(replace(each, checksum=checksum) for each, checksum in zip(tensors, found, strict=True))


def checksums(data: Tensor, tensors: Sequence[WeightTensor]) -> list[str]:
    """A 64-bit digest of each tensor's bytes in a bucket, computed where the bytes are; 16 hex digits each.

    The sum over 64-bit words, modulo 2^64, of the word times an odd multiplier that depends on its place: a word that changed
    or moved changes it. It guards against mistakes in transport, not against an adversary. data: uint8 [bucket].
    """
    sums = [_weighted_sum(data[each.offset_bytes : each.offset_bytes + each.size_bytes]) for each in tensors]
    return [f"{value % (1 << 64):016x}" for value in torch.stack(sums).tolist()] if sums else []


def _weighted_sum(raw: Tensor) -> Tensor:
    """int64 scalar on the tensor's device; bytes after the last whole word count as one more word, filled with zeros."""
    whole = raw.numel() // 8
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    words = raw[: whole * 8].view(torch.int64)
    for first in range(0, whole, _CHUNK_WORDS):
        part = words[first : first + _CHUNK_WORDS]
        places = torch.arange(first + 1, first + 1 + part.numel(), dtype=torch.int64, device=raw.device)
        total += (part * (places * _MULTIPLIER | 1)).sum()
    if rest := raw.numel() - whole * 8:
        last = torch.zeros(8, dtype=torch.uint8, device=raw.device)
        last[:rest] = raw[whole * 8 :]
        total += (last.view(torch.int64) * ((whole + 1) * _MULTIPLIER % (1 << 63) | 1)).sum()
    return total
