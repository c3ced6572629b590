"""The layout of a bucket in GPU memory: full tensors of one dtype, tightly packed in one flat tensor of bytes.

It is the layout of SGLang's FlattenedTensorBucket, so an engine there takes a bucket as it is.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from miles_plan.backends.engine import EngineError, WeightBucket, WeightTensor
from miles_plan.backends.weight_transport.shared_memory import plan_buckets

SAMPLED_OF = 16  # one tensor in so many has a checksum in one version; over as many versions all have had one


@dataclass(frozen=True, slots=True)
class FullTensor:
    """Shape and dtype of one full tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def cut_into_buckets(tensors: Mapping[str, FullTensor], bucket_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Names by bucket: at most `bucket_bytes` each (a larger tensor gets its own), one dtype each, in the order given."""
    dtypes = list(dict.fromkeys(tensor.dtype for tensor in tensors.values()))
    sizes = {name: tensor.size_bytes for name, tensor in tensors.items()}
    owners = {name: dtypes.index(tensor.dtype) for name, tensor in tensors.items()}  # owners never share a bucket
    return tuple(plan.names for plan in plan_buckets(sizes, owners, bucket_bytes))


def views_of(flat: Tensor, names: tuple[str, ...], tensors: Mapping[str, FullTensor]) -> dict[str, Tensor]:
    """Each tensor's place in a flat tensor of bytes."""
    found, offset = {}, 0
    for name in names:
        tensor = tensors[name]
        found[name] = flat[offset : offset + tensor.size_bytes].view(tensor.dtype).view(tensor.shape)
        offset += tensor.size_bytes
    return found


def describe(views: Mapping[str, Tensor], version: int) -> tuple[WeightTensor, ...]:
    """What a receiver must know of a packed bucket; checksums of the tensors sampled in this version, "" for the others."""
    described, offset = [], 0
    for name, view in views.items():
        described.append(
            WeightTensor(
                name=name,
                shape=tuple(view.shape),
                dtype=str(view.dtype).removeprefix("torch."),
                offset_bytes=offset,
                size_bytes=view.nbytes,
                checksum=checksum_of(view) if offset == 0 or is_sampled(name, version) else "",
            )
        )
        offset += view.nbytes
    return tuple(described)


def is_sampled(name: str, version: int) -> bool:
    """Whether the tensor has a checksum in this version."""
    return zlib.crc32(name.encode()) % SAMPLED_OF == version % SAMPLED_OF


def checksum_of(tensor: Tensor) -> str:
    """SHA-256 of a contiguous tensor's bytes, first 16 hex digits; copied to the host for it."""
    return hashlib.sha256(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().data).hexdigest()[:16]


def tensors_of(bucket: WeightBucket, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The full tensors of a bucket that has arrived, as views. EngineError names one whose bytes are not those sent."""
    for tensor in bucket.tensors:
        raw = flat[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
        if tensor.checksum and checksum_of(raw) != tensor.checksum:
            raise EngineError(
                f"weight '{tensor.name}' of version {bucket.version} does not match its checksum {tensor.checksum}"
            )
        yield tensor.name, raw.view(getattr(torch, tensor.dtype)).view(tensor.shape)
