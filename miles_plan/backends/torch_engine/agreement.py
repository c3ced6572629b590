"""A failure on one rank is a failure of all: the others must not wait in the next collective for a rank that gave up."""

from __future__ import annotations

import torch

from miles_plan.backends.engine import EngineError
from miles_plan.kernels.collectives import RankGroup


def raise_together(error: EngineError | None, group: RankGroup, what: str) -> None:
    """Raise this rank's error; on ranks without one, an EngineError that `what` failed elsewhere. Return when nobody failed."""
    failed = int(group.all_reduce_sum(torch.tensor([float(error is not None)])))
    if error is not None:
        raise error
    if failed:
        raise EngineError(f"{what}: it failed on {failed} other ranks of {group.size}, which say why")
