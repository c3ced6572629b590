"""How a trainer's state passes through torch.distributed.checkpoint: in pieces, on several threads, through few host buffers.

torch's writer brings every tensor to fresh host memory and keeps it there until its file is closed: a state of 8 GB touches
8 GB of new pages, which takes longer than to write it. Here tensors are cut along their first dimension into pieces, which
torch.distributed.checkpoint knows as shards of one tensor, and each thread copies its pieces through one pinned buffer.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, WriteItem, WriteItemType
from torch.futures import Future

PIECE_BYTES = 64 << 20
THREADS = 8  # files a rank writes, or reads, at once


class PiecewisePlanner(DefaultSavePlanner):
    """Saves the tensors of a flat state by pieces. Writers may hold what `resolve_data` returns until they ask again."""

    def __init__(self) -> None:
        """Nothing is planned yet."""
        super().__init__()
        self._of_thread = threading.local()

    def create_local_plan(self) -> SavePlan:
        """torch's own plan, large tensors in several items."""
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[piece for item in plan.items for piece in _pieces(item, self.state_dict)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """A piece in host memory."""
        if write_item.type != WriteItemType.SHARD:
            return super().resolve_data(write_item)
        assert write_item.tensor_data is not None, "pieces are of tensors"
        chunk = write_item.tensor_data.chunk
        tensor: Tensor = self.state_dict[write_item.index.fqn]
        piece = tensor.narrow(0, chunk.offsets[0], chunk.sizes[0])
        return self._staged(piece) if piece.is_cuda else piece

    def _staged(self, piece: Tensor) -> Tensor:
        """Through this thread's buffer, with a storage of its own size: torch's writer copies a part of a larger one again."""
        held: Tensor | None = getattr(self._of_thread, "buffer", None)
        if held is None or held.nbytes < piece.nbytes:
            held = self._of_thread.buffer = torch.empty(max(PIECE_BYTES, piece.nbytes), dtype=torch.uint8, pin_memory=True)
        staged = torch.frombuffer(held.numpy(), dtype=piece.dtype, count=piece.numel()).view(piece.shape)
        return staged.copy_(piece)


class ThreadedReader(FileSystemReader):
    """torch's reader, one thread a file: alone it takes 0.4 GB/s."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors. Raises what the first file that cannot be read raised."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)

        def read(items: list[ReadItem]) -> None:
            super(ThreadedReader, self).read_data(replace(plan, items=items), planner)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(read, by_file.values()))
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _pieces(item: WriteItem, state: dict[str, Any]) -> list[WriteItem]:
    """Items of at most PIECE_BYTES, of a row at least; those of tensors on a CPU, which are written as they lie, stay whole."""
    data, tensor = item.tensor_data, state[item.index.fqn]
    if data is None or item.type != WriteItemType.TENSOR or not tensor.dim() or not tensor.numel() or not _staged(tensor):
        return [item]
    rows = max(1, PIECE_BYTES // (tensor.nbytes // len(tensor)))
    found = []
    for start in range(0, len(tensor), rows):
        offsets = torch.Size((start, *[0] * (tensor.dim() - 1)))
        sizes = torch.Size((min(rows, len(tensor) - start), *tensor.shape[1:]))
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
        index = replace(item.index, offset=offsets)
        found.append(replace(item, index=index, type=WriteItemType.SHARD, tensor_data=replace(data, chunk=chunk)))
    return found


def _staged(tensor: Tensor) -> bool:
    """Whether a tensor passes through host buffers."""
    return tensor.is_cuda
