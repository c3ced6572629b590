"""The ranks of a trainer under torch.distributed: how they meet, and that a failure of one is a failure of all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from miles_plan.backends.engine import EngineError


def open_process_group(world_size: int, rank: int, rendezvous: str | None, *, device: str) -> None:
    """Start torch.distributed where it has not been started, over NCCL or gloo; collective. One rank needs no rendezvous.

    ValueError without a rendezvous for several ranks, EngineError when this process belongs to another number of ranks.
    """
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if not dist.is_initialized():
        if rendezvous is None and world_size > 1:
            raise ValueError(f"{world_size} ranks need a rendezvous")
        stores: Any = dist  # the stores are missing from torch's stubs
        backend = "nccl" if device == "cuda" else "gloo"
        store = None if rendezvous else stores.HashStore()
        dist.init_process_group(backend, init_method=rendezvous, store=store, rank=rank, world_size=world_size)
    if dist.get_world_size() != world_size:
        raise EngineError(f"train engine: this process belongs to {dist.get_world_size()} ranks, the layout has {world_size}")


def raise_together(error: EngineError | None, what: str, *, device: str) -> None:
    """Raise this rank's error; on ranks without one, an EngineError that `what` failed elsewhere. Return when nobody failed."""
    failed = torch.tensor([int(error is not None)], device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(failed)
    if error is not None:
        raise error
    if int(failed):
        raise EngineError(f"{what}: it failed on {int(failed)} other ranks of {dist.get_world_size()}, which say why")
