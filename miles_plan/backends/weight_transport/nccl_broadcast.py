"""Buckets from one trainer rank to engines on other GPUs, by NCCL broadcast in a group of their own.

The group is made as SGLang makes its side (`init_weights_update_group`: a rendezvous, a prefix store named after the group, and
torch's own group constructor), because the default group of each side holds only its own ranks.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from miles_plan.backends.engine import EngineError, WeightBucket

TRANSPORT = "nccl_broadcast"
SOURCE = 0  # the trainer's rank in the group


def join_group(
    *, name: str, init_method: str, world_size: int, rank: int, backend: str = "nccl", timeout_s: float = 600.0
) -> Any:
    """Meet the other members; blocks until all are there. `init_method` is tcp://HOST:PORT, where rank 0 listens."""
    from torch.distributed import distributed_c10d as c10d

    internals: Any = c10d  # a second default group can be made by its internals only
    timeout = timedelta(seconds=timeout_s)
    store, rank, world_size = next(internals.rendezvous(init_method, rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = internals._new_process_group_helper(
        world_size,
        rank,
        [],
        internals.Backend(backend),
        internals.PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
    )
    internals._world.pg_group_ranks[group] = {each: each for each in range(world_size)}
    return group


def handle_of(name: str) -> str:
    """A bucket's handle: the group it is broadcast in, and by whom."""
    return json.dumps({"group": name, "source": SOURCE})


def broadcast(flat: Tensor, group: Any) -> Any:
    """Start sending, or receiving, a bucket's bytes; wait on what is returned before they are read or overwritten."""
    return dist.broadcast(flat, group_src=SOURCE, group=group, async_op=True)


def check_bucket(bucket: WeightBucket, name: str) -> None:
    """EngineError when the bucket comes another way than through the group of this name."""
    if bucket.transport != TRANSPORT or json.loads(bucket.handle)["group"] != name:
        raise EngineError(f"bucket {bucket.index} travels by '{bucket.transport}' {bucket.handle}, not in the group '{name}'")
