"""A set of ranks that talk: torch.distributed's backends, opened one by one instead of through the process-wide default group.

An engine owns its groups, so one process can hold a trainer and a rollout engine of different sizes, and closing one
touches nothing else. A group of one rank talks to nobody and needs no backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

_TAG = 0


@dataclass(frozen=True, slots=True)
class RankGroup:
    """Ranks 0 .. size - 1 of one group, seen from `rank`; `global_ranks` names them in the engine's world."""

    rank: int
    size: int
    global_ranks: tuple[int, ...]
    backend: Any = None  # a torch.distributed backend; its methods are missing from torch's stubs

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over the ranks, in place."""
        return self._all_reduce(x, dist.ReduceOp.SUM)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the ranks, in place."""
        return self._all_reduce(x, dist.ReduceOp.MAX)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, in rank order; shapes must be equal."""
        if self.backend is None or x.numel() == 0:
            return [x] * self.size
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.backend.allgather([parts], [x.contiguous()]).wait()
        return parts

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """Rank `source`'s x on every rank, in place."""
        if self.backend is not None and x.numel():
            self.backend.broadcast(x, source).wait()
        return x

    def all_to_all(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """Send the first send_rows[0] rows of x to rank 0, the next to rank 1, ...; what came, in rank order."""
        if self.backend is None:
            return x
        received = x.new_empty((sum(receive_rows), *x.shape[1:]))
        self.backend.alltoall_base(received, x.contiguous(), list(receive_rows), list(send_rows)).wait()
        return received

    def send(self, x: Tensor, to: int) -> None:
        """Send x to rank `to`; returns when it is on its way."""
        self.start_send(x.contiguous(), to).wait()

    def start_send(self, x: Tensor, to: int) -> Any:
        """Send x, contiguous, to rank `to` without waiting; x must live and stay as it is until `wait()` on the answer."""
        if self.backend is None:
            raise ValueError("a group of one rank has nobody to send to")
        return self.backend.send([x], to, _TAG)

    def receive(self, x: Tensor, source: int) -> Tensor:
        """Fill x with what rank `source` sends."""
        if self.backend is None:
            raise ValueError("a group of one rank has nobody to receive from")
        self.backend.recv([x], source, _TAG).wait()
        return x

    def barrier(self) -> None:
        """Return when every rank has come."""
        if self.backend is not None:
            self.backend.barrier().wait()

    def close(self) -> None:
        """Close the connections; the group must not be used after."""
        if self.backend is not None:
            self.backend.shutdown()

    def _all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.backend is not None and x.numel():
            self.backend.allreduce(x, op).wait()
        return x


def single_rank(global_rank: int = 0) -> RankGroup:
    """A group of one."""
    return RankGroup(rank=0, size=1, global_ranks=(global_rank,))


def open_group(
    store: Store | None, name: str, global_ranks: Sequence[int], global_rank: int, *, host: str, timeout_s: float
) -> RankGroup:
    """Connect these ranks over gloo; `name` is unique in the store and equal on all of them. `host` is this rank's address."""
    ranks = tuple(global_ranks)
    if store is None or len(ranks) == 1:
        return single_rank(global_rank)
    gloo: Any = dist.ProcessGroupGloo  # its options are missing from torch's stubs
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_s)
    backend = gloo(PrefixStore(name, store), ranks.index(global_rank), len(ranks), options)
    return RankGroup(rank=ranks.index(global_rank), size=len(ranks), global_ranks=ranks, backend=backend)
