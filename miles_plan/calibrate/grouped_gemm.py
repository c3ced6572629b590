"""The products of a layer's experts in one kernel: torch's grouped product, weights of every expert read once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from miles_plan.calibrate.points import GroupedGemmPoint
from miles_plan.calibrate.timing import rotations, time_calls

GroupedShape = tuple[int, int, int, int]


def measure_grouped_gemms(
    device: torch.device, shapes: Sequence[GroupedShape], budget_s: float
) -> tuple[GroupedGemmPoint, ...]:
    """Grouped bf16 products of every (experts, rows of each, n, k); none where this torch or chip has no such kernel."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return ()  # torch falls back to a loop of products there, which no engine runs
    found = []
    for experts, m, n, k in shapes:
        sets = rotations(2 * (experts * m * (k + n) + experts * n * k))
        rows = [torch.randn(experts * m, k, device=device, dtype=torch.bfloat16) for _ in range(sets)]
        weights = [torch.randn(experts, n, k, device=device, dtype=torch.bfloat16) for _ in range(sets)]
        ends = torch.arange(m, experts * m + 1, m, device=device, dtype=torch.int32)
        calls = [partial(torch._grouped_mm, a, b.transpose(1, 2), offs=ends) for a, b in zip(rows, weights, strict=True)]
        timing = time_calls(calls, device, budget_s / len(shapes))
        found.append(GroupedGemmPoint(experts=experts, m=m, n=n, k=k, seconds=timing.seconds, spread=timing.spread))
    return tuple(found)
