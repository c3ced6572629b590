"""One trainer rank's part in handing out weights: buckets by any transport, a hash, a checkpoint. All of it is collective.

A trainer says what its full tensors are and how to fill a bucket with them; the rest does not depend on how it shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from miles_plan.backends.engine import EngineError, WeightBucket
from miles_plan.backends.training.agreement import raise_together
from miles_plan.backends.training.exported_checkpoint import digest, digest_of_model, make_aside, write_aside
from miles_plan.backends.weight_transport import cuda_ipc, nccl_broadcast
from miles_plan.backends.weight_transport.buckets import FullTensor, cut_into_buckets, describe, views_of
from miles_plan.backends.weight_transport.shared_memory import BucketPlan, SharedMemoryWriter

Transport = Literal["shared_memory", "cuda_ipc", "nccl_broadcast"]
Fill = Callable[[Tensor, Mapping[str, Tensor]], None]
_STAGING_BYTES = 1 << 30  # of one gather for a hash or a checkpoint


@dataclass(slots=True, eq=False)
class WeightPublisher:
    """tensors: the full tensors by Hugging Face name, in model order; fill(flat, views): fill the views, which tile `flat`
    (zeroed bytes), with full tensors; it is called on every rank alike, and every rank has all bytes afterwards."""

    tensors: Mapping[str, FullTensor]
    fill: Fill
    transport: Transport
    device: str
    _writer: SharedMemoryWriter | None = None
    _buffers: list[Tensor] | None = None
    _group: Any = None
    _group_name: str = ""

    @property
    def rank(self) -> int:
        """This rank in the trainer's world."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        """Ranks of the trainer."""
        return dist.get_world_size() if dist.is_initialized() else 1

    def publish(self, version: int, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Bucket after bucket; every rank must run the iterator to its end, in step with the others.

        shared_memory: rank 0 yields. cuda_ipc, nccl_broadcast: every rank yields every bucket, with the same handle; a bucket's
        bytes stay until the next but one is asked for, those of the last two until `release`.
        """
        plans = cut_into_buckets(self.tensors, bucket_bytes)
        if self.transport == "shared_memory":
            yield from self._publish_in_memory(version, plans)
            return
        if self.transport == "nccl_broadcast" and not self._group_name:
            raise EngineError("train engine: no weight group was opened; call open_weight_group first")
        sending: list[Any] = [None, None]
        for index, names in enumerate(plans):
            turn = index % 2
            _wait(sending[turn])
            flat, views = self._gather(names, self._buffer(turn, plans))
            handle = self._handle(flat)
            if self._group is not None:
                sending[turn] = nccl_broadcast.broadcast(flat, self._group)
            yield WeightBucket(
                transport=self.transport,
                version=version,
                index=index,
                handle=handle,
                tensors=describe(views, version),
                last=index == len(plans) - 1,
            )
        for each in sending:
            _wait(each)

    def release(self, version: int) -> None:
        """Free what `publish` of that version left."""
        if self._writer is not None:
            self._writer.release(version)
        self._buffers = None
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def open_group(self, *, name: str, init_method: str, world_size: int) -> None:
        """Join the group that broadcasts run in: rank 0 does and waits for the receivers, other ranks only take note."""
        self._group_name = name
        if self.rank == 0:
            self._group = nccl_broadcast.join_group(name=name, init_method=init_method, world_size=world_size, rank=0)

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
        tensors = ((name, tensor.cpu().clone()) for name, tensor in self._all_tensors())
        if aside is None:
            for _ in self._all_tensors():
                pass
            return []
        dtype = str(next(iter(self.tensors.values())).dtype).removeprefix("torch.")
        return write_aside(aside, directory, source, tensors, dtype)

    def close(self) -> None:
        """Free everything; leave the group."""
        self._buffers = None
        if self._writer is not None:
            self._writer.close()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _publish_in_memory(self, version: int, plans: tuple[tuple[str, ...], ...]) -> Iterator[WeightBucket]:
        for index, names in enumerate(plans):
            _, views = self._gather(names)
            if self.rank == 0:
                self._writer = self._writer or SharedMemoryWriter()
                plan = BucketPlan(index, 0, names, index == len(plans) - 1)
                yield self._writer.write(version, plan, list(views.items()))

    def _gather(self, names: tuple[str, ...], buffer: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Full tensors side by side on every rank: the bytes, and each tensor's view of them."""
        size = sum(self.tensors[name].size_bytes for name in names)
        flat = torch.empty(size, dtype=torch.uint8, device=self.device) if buffer is None else buffer[:size]
        flat.zero_()
        views = views_of(flat, names, self.tensors)
        self.fill(flat, views)
        return flat, views

    def _all_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for names in cut_into_buckets(self.tensors, _STAGING_BYTES):
            yield from self._gather(names)[1].items()

    def _buffer(self, turn: int, plans: tuple[tuple[str, ...], ...]) -> Tensor:
        """One of two buffers, each as large as the largest bucket."""
        if self._buffers is None:
            size = max(sum(self.tensors[name].size_bytes for name in names) for names in plans)
            self._buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(min(2, len(plans)))]
        return self._buffers[turn]

    def _handle(self, flat: Tensor) -> str:
        if self.transport == "nccl_broadcast":
            return nccl_broadcast.handle_of(self._group_name)
        own = (cuda_ipc.gpu_uuid(flat.device.index), cuda_ipc.export_flat(flat))
        found: list[Any] = [own]
        torch.cuda.current_stream().synchronize()  # the receiver reads on a stream of its own
        if self.world_size > 1:
            found = [None] * self.world_size
            dist.all_gather_object(found, own)
        return cuda_ipc.join_handles(dict(found))


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()
