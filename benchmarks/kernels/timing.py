"""Device time of interchangeable functions, measured side by side.

Each contender is captured several times into one CUDA graph that walks rotating inputs (together larger than L2), so launch
overhead and cached weights are out of the number. Then the contenders' graphs are replayed in turn, round after round: clocks
and power drift hits all of them alike. The figure is the median over rounds of a replay's time divided by its calls.

A replay is queued behind a kernel that only passes time, so that the host has launched the graph before the clock starts. Else
its launch, some ten microseconds, would be divided by fewer calls for a contender whose Python is slow, because the number of
calls follows from a first timing outside a graph, and a kernel of one microsecond would look a fifth slower than its baseline.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
L2_BYTES = 60 * 2**20
ROTATE_BYTES = 4 * L2_BYTES
QUEUED_CYCLES = 400_000  # about 0.2 ms


def copies(bytes_each: int, most: int = 16) -> int:
    """How many copies of an input must rotate so that none is still in L2 when its turn comes again."""
    return max(1, min(most, -(-ROTATE_BYTES // max(bytes_each, 1))))


def event_ms(run: Call) -> float:
    """Milliseconds on the device, the host waiting for the end."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def queued_ms(run: Call) -> float:
    """The same of work that the device finds queued when its turn comes: the host's part of the launch is over by then."""
    torch.cuda._sleep(QUEUED_CYCLES)
    return event_ms(run)


def _capture(calls: Sequence[Call], budget_ms: float, before: Call | None) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of enough calls to fill `budget_ms`, and how many they are. `before` sets what must hold while capturing."""
    if before is not None:
        before()
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    once_ms = max(queued_ms(lambda: [call() for call in calls[:3]]) / len(calls[:3]), 2e-3)
    repeats = max(1, min(200, int(budget_ms / once_ms)))
    repeats = max(repeats, min(len(calls), max(1, int(40 / once_ms))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            calls[i % len(calls)]()
    return graph, repeats


def time_side_by_side(
    contenders: Mapping[str, Sequence[Call]],
    *,
    budget_ms: float = 2.0,
    rounds: int = 7,
    before: Mapping[str, Call] | None = None,
) -> dict[str, float]:
    """Microseconds per call of each contender; its calls do the same work on rotating inputs."""
    graphs = {name: _capture(calls, budget_ms, (before or {}).get(name)) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(2):
        for graph, _ in graphs.values():
            graph.replay()
    torch.cuda.synchronize()
    order = list(graphs)
    for turn in range(rounds):
        for name in order if turn % 2 == 0 else reversed(order):
            graph, repeats = graphs[name]
            times[name].append(queued_ms(graph.replay) / repeats * 1e3)
    return {name: statistics.median(samples) for name, samples in times.items()}
