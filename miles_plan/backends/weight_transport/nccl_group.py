"""A process group between a trainer and rollout engines, which are in worlds of their own.

SGLang's ranks join with their own code, so the trainer must name the rendezvous just as they do: a prefix store of the group's
name over one TCP store (`init_custom_process_group` of SGLang 0.5.16, after OpenRLHF).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

TIMEOUT_S = 300.0


def join_as_sender(
    address: str, port: int, *, world_size: int, name: str, timeout_s: float = TIMEOUT_S, backend: str = "nccl"
) -> Any:
    """Rank 0 of the group: the trainer that sends. RuntimeError when the others do not come in time.

    With NCCL it returns at once, and the ranks meet in the first broadcast.
    """
    import torch.distributed.distributed_c10d as c10d

    core: Any = c10d  # what follows is not among its public names, so it has no types
    wait = timedelta(seconds=timeout_s)
    store, rank, size = next(core.rendezvous(f"tcp://{address}:{port}", 0, world_size, timeout=wait))
    store.set_timeout(wait)
    group, _ = core._new_process_group_helper(
        size,
        rank,
        [],
        core.Backend(backend),
        core.PrefixStore(name, store),
        group_name=name,
        backend_options=None,
        timeout=wait,
    )
    core._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group
