"""How long device work takes: events around replays of a CUDA graph, medians, inputs rotated past the last-level cache.

A graph keeps the host's launches out of the figure, so that microseconds can be measured; work that cannot be captured
(autograd) is timed between events, with launches ahead of the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

ROTATED_BYTES = 256 << 20
"""Inputs of one measurement together, several times the largest last-level cache (126 MB on a B200)."""
FEWEST, MOST = 5, 40
"""Repetitions of a measurement."""

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of one call, and the interquartile range of its repetitions over the median."""

    seconds: float
    spread: float


def rotations(bytes_of_one: int) -> int:
    """Input sets that together leave no cache warm for the next call; at least two, at most 64."""
    return max(2, min(64, -(-ROTATED_BYTES // max(1, bytes_of_one))))


def time_calls(
    calls: Sequence[Call], device: torch.device, budget_s: float, *, capture: bool = True, repetitions: int = 0
) -> Timing:
    """Time `calls`, the same work on different inputs; the figure is of one call.

    budget_s: about how long to repeat, unless repetitions says how often (what several processes do together must agree).
    """
    if device.type != "cuda":
        return _repeat(lambda: _host_seconds(calls), len(calls), budget_s, repetitions)
    _warm_up(calls)
    if not capture:
        return _repeat(lambda: _event_seconds(lambda: [call() for call in calls]), len(calls), budget_s, repetitions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return _repeat(lambda: _event_seconds(graph.replay), len(calls), budget_s, repetitions)


def _warm_up(calls: Sequence[Call]) -> None:
    """Load kernels and create handles on a side stream, as capturing demands."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def _event_seconds(work: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _host_seconds(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def _repeat(measure: Callable[[], float], calls: int, budget_s: float, repetitions: int) -> Timing:
    first = [measure() for _ in range(2)]
    wanted = repetitions or max(FEWEST, min(MOST, int(budget_s / max(first[-1], 1e-9))))
    found = [measure() for _ in range(wanted)]
    median = statistics.median(found)
    low, _, high = statistics.quantiles(found, n=4)
    return Timing(median / calls, (high - low) / median)
