"""One trainer rank's part in handing out weights: streams, buckets in shared memory, a hash, a checkpoint. All is collective.

A trainer says what its full tensors are and how to fill a bucket with them; the rest does not depend on how it shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from miles_plan.backends.engine import BucketLayout, DeviceBucket, EngineError, WeightBucket, WeightTensor
from miles_plan.backends.training.agreement import raise_together
from miles_plan.backends.training.device_allocator import native_segments
from miles_plan.backends.training.exported_checkpoint import digest, digest_of_model, make_aside, write_aside
from miles_plan.backends.weight_transport.shared_memory import BucketPlan, SharedMemoryWriter, plan_buckets

Fill = Callable[[Tensor, Mapping[str, Tensor]], None]
ALIGNMENT_BYTES = 64  # of a tensor in a bucket, so that every dtype can be viewed in place
_STAGING_BYTES = 1 << 30  # of one gather for a hash or a checkpoint


@dataclass(frozen=True, slots=True)
class FullTensor:
    """Shape and dtype of one full tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(slots=True, eq=False)
class WeightPublisher:
    """Hands out the weights of a trainer, of which this is one rank.

    tensors: the full tensors by Hugging Face name, in model order; fill(flat, views): fill the views, places in the zeroed
    bytes `flat`, with full tensors; it is called on every rank alike, and every rank has all bytes afterwards.
    """

    tensors: Mapping[str, FullTensor]
    fill: Fill
    device: str
    _writer: SharedMemoryWriter | None = None

    @property
    def rank(self) -> int:
        """This rank in the trainer's world."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        """Ranks of the trainer."""
        return dist.get_world_size() if dist.is_initialized() else 1

    def layout(self, bucket_bytes: int) -> tuple[BucketLayout, ...]:
        """Buckets of at most `bucket_bytes` (a larger tensor gets its own), in model order; a pure function of the model."""
        sizes = {name: tensor.size_bytes for name, tensor in self.tensors.items()}
        plans = plan_buckets(sizes, dict.fromkeys(sizes, 0), bucket_bytes)
        return tuple(BucketLayout(index=plan.index, tensors=self._places(plan), last=plan.last) for plan in plans)

    def stream(self, bucket_bytes: int) -> Iterator[DeviceBucket]:
        """The buckets in device memory, whole on every rank, one staging buffer for all; in step with the other ranks."""
        layouts = self.layout(bucket_bytes)
        with native_segments(self.device):
            staging = torch.empty(max(each.size_bytes for each in layouts), dtype=torch.uint8, device=self.device)
        for each in layouts:
            flat = staging[: each.size_bytes].zero_()
            self.fill(flat, _views(flat, each))
            if self.device == "cuda":
                torch.cuda.current_stream().synchronize()  # whoever takes the bytes works on a stream of its own
            yield DeviceBucket(layout=each, data=flat)

    def publish(self, version: int, bucket_bytes: int) -> Iterator[WeightBucket]:
        """The buckets in shared memory: rank 0 yields them, and every rank must run the iterator to its end."""
        for bucket in self.stream(bucket_bytes):
            if self.rank == 0:
                self._writer = self._writer or SharedMemoryWriter()
                views = _views(bucket.data, bucket.layout)
                plan = BucketPlan(bucket.layout.index, 0, tuple(views), bucket.layout.last)
                yield self._writer.write(version, plan, list(views.items()))

    def release(self, version: int) -> None:
        """Remove the shared memory of that version."""
        if self._writer is not None:
            self._writer.release(version)

    def sha256(self) -> str:
        """SHA-256 over all full tensors, the same on every rank and for every layout; ranks share the hashing."""
        table = torch.zeros(len(self.tensors), 32, dtype=torch.int32)
        rows = {name: row for row, name in enumerate(self.tensors)}
        for name, tensor in self._all_tensors():
            if rows[name] % self.world_size == self.rank:
                table[rows[name]] = torch.tensor(list(digest(tensor)), dtype=torch.int32)
        if self.world_size > 1:
            shared = table.to(self.device)
            dist.all_reduce(shared)
            table = shared.cpu()
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        dtype = next(iter(self.tensors.values())).dtype
        return digest_of_model(shapes, dtype, {name: bytes(table[row].tolist()) for name, row in rows.items()})

    def write_checkpoint(self, directory: Path, source: Path) -> list[str]:
        """A checkpoint that transformers loads, with config and tokenizer files from `source`; rank 0 writes and returns names.

        The directory must not exist yet and appears when it is whole. EngineError names a path that cannot be written.
        """
        aside, error = None, None
        if self.rank == 0:
            try:
                aside = make_aside(directory)
            except EngineError as caught:
                error = caught
        raise_together(error, f"writing the checkpoint {directory}", device=self.device)
        if aside is None:
            for _ in self._all_tensors():
                pass
            return []
        tensors = ((name, tensor.cpu().clone()) for name, tensor in self._all_tensors())
        dtype = str(next(iter(self.tensors.values())).dtype).removeprefix("torch.")
        return write_aside(aside, directory, source, tensors, dtype)

    def close(self) -> None:
        """Remove all shared memory."""
        if self._writer is not None:
            self._writer.close()

    def _places(self, plan: BucketPlan) -> tuple[WeightTensor, ...]:
        places, offset = [], 0
        for name in plan.names:
            tensor = self.tensors[name]
            places.append(
                WeightTensor(
                    name=name,
                    shape=tensor.shape,
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    offset_bytes=offset,
                    size_bytes=tensor.size_bytes,
                    checksum="",
                )
            )
            offset += -(-tensor.size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return tuple(places)

    def _all_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for bucket in self.stream(_STAGING_BYTES):
            yield from _views(bucket.data, bucket.layout).items()


def _views(flat: Tensor, layout: BucketLayout) -> dict[str, Tensor]:
    """Each tensor of a bucket, in its place."""
    return {
        each.name: flat[each.offset_bytes : each.offset_bytes + each.size_bytes]
        .view(getattr(torch, each.dtype))
        .view(each.shape)
        for each in layout.tensors
    }
