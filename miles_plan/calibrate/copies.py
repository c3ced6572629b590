"""Bandwidth: kernels that stream through device memory, copies from and to page-locked host memory, and the page-locking."""

from __future__ import annotations

import itertools
import statistics
import time
from functools import partial

import torch

from miles_plan.calibrate.points import HostCopyPoint, StreamPoint
from miles_plan.calibrate.timing import Call, time_calls

PINNED_BUFFERS = 4


def measure_streams(device: torch.device, size_bytes: int, budget_s: float) -> tuple[StreamPoint, ...]:
    """Copy, scale and add, in bf16, of tensors of size_bytes each: what the kernels between matrix products do."""
    sources = [torch.randn(size_bytes // 2, device=device, dtype=torch.bfloat16) for _ in range(3)]
    target = torch.empty_like(sources[0])
    pairs = list(itertools.pairwise(sources))
    kernels: dict[str, tuple[int, list[Call]]] = {
        "copy": (2, [partial(target.copy_, each) for each in sources]),
        "scale": (2, [partial(torch.mul, each, 0.5, out=target) for each in sources]),
        "add": (3, [partial(torch.add, one, other, out=target) for one, other in pairs]),
    }
    found = []
    for kernel, (passes, calls) in kernels.items():
        timing = time_calls(calls, device, budget_s / len(kernels), capture=False)  # a captured copy takes a slower engine
        moved = passes * target.numel() * target.element_size()
        found.append(StreamPoint(kernel=kernel, moved_bytes=moved, seconds=timing.seconds, spread=timing.spread))
    return tuple(found)


def measure_host_copies(device: torch.device, sizes_bytes: tuple[int, ...], budget_s: float) -> tuple[HostCopyPoint, ...]:
    """Both directions at every size, after the time that page-locking takes."""
    largest = max(sizes_bytes)
    found = [_pinning(largest // PINNED_BUFFERS)] if device.type == "cuda" else []
    host = torch.empty(largest, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(largest, dtype=torch.uint8, device=device).random_(0, 255)
    host.copy_(there)
    for size in sizes_bytes:
        each_s = budget_s / len(sizes_bytes) / 2
        to_device = time_calls([partial(there[:size].copy_, host[:size], non_blocking=True)], device, each_s)
        to_host = time_calls([partial(host[:size].copy_, there[:size], non_blocking=True)], device, each_s)
        found += [
            HostCopyPoint(direction="host_to_device", size_bytes=size, seconds=to_device.seconds, spread=to_device.spread),
            HostCopyPoint(direction="device_to_host", size_bytes=size, seconds=to_host.seconds, spread=to_host.spread),
        ]
    return tuple(found)


def _pinning(size_bytes: int) -> HostCopyPoint:
    """Page-locking of fresh buffers, all kept so that none is handed out twice. The first sets the allocator up."""
    kept, spent = [], []
    for _ in range(PINNED_BUFFERS):
        start = time.perf_counter()
        kept.append(torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True))
        spent.append(time.perf_counter() - start)
    return HostCopyPoint(direction="pin", size_bytes=size_bytes, seconds=statistics.median(spent[1:]))
