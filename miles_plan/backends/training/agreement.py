"""A failure on one rank of torch.distributed is a failure of all: the others must not wait in the next collective for ever."""

from __future__ import annotations

import torch
import torch.distributed as dist

from miles_plan.backends.engine import EngineError


def raise_together(error: EngineError | None, what: str, *, device: str) -> None:
    """Raise this rank's error; on ranks without one, an EngineError that `what` failed elsewhere. Return when nobody failed."""
    failed = torch.tensor([int(error is not None)], device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(failed)
    if error is not None:
        raise error
    if int(failed):
        raise EngineError(f"{what}: it failed on {int(failed)} other ranks of {dist.get_world_size()}, which say why")
