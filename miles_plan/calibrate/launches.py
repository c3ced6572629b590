"""What a launch costs: the host's part of an eager one, and the device's part of one replayed from a CUDA graph."""

from __future__ import annotations

import statistics
import time

import torch

from miles_plan.calibrate.points import LaunchPoint
from miles_plan.calibrate.timing import time_calls

LAUNCHES = 400
ROUNDS = 9


def measure_launches(device: torch.device, budget_s: float) -> tuple[LaunchPoint, ...]:
    """An in-place addition on 1024 numbers launched eagerly and from a graph, and the smallest useful product from a graph."""
    small = torch.randn(1024, device=device)
    eager = [_eager_s(small, device) for _ in range(ROUNDS)]
    median = statistics.median(eager)
    low, _, high = statistics.quantiles(eager, n=4)
    kernel = time_calls([lambda: small.add_(1.0)] * LAUNCHES, device, budget_s / 2)
    a, b = (torch.randn(64, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = time_calls([lambda: torch.mm(a, b, out=out)] * LAUNCHES, device, budget_s / 2)
    return (
        LaunchPoint(way="eager_host", seconds=median, spread=(high - low) / median),
        LaunchPoint(way="graph_kernel", seconds=kernel.seconds, spread=kernel.spread),
        LaunchPoint(way="graph_product", seconds=product.seconds, spread=product.spread),
    )


def _eager_s(small: torch.Tensor, device: torch.device) -> float:
    """Host seconds of one launch, the device's queue never full."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(LAUNCHES):
        small.add_(1.0)
    spent = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return spent / LAUNCHES
