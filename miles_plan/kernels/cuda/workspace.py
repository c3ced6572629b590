"""Zeros for kernels that count in memory and leave it at zero again.

Launches of one stream run one after another, so a stream shares one region. A captured CUDA graph may be replayed on any
stream, so each captured launch gets a region of its own, cut from memory that was zeroed before; capture itself can only record
a fill, which is what is left when that memory is used up or capture came before any other launch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

POOL_INTS = 1 << 22  # 16 MiB
LEAST_INTS = 1 << 14  # of a stream's region, so that it seldom grows


@dataclass
class _Pool:
    """One device's zeroed memory."""

    ints: torch.Tensor
    used: int = 0
    of_stream: dict[int, torch.Tensor] = field(default_factory=dict)

    def cut(self, count: int) -> torch.Tensor | None:
        """The next `count` zeros, or None if they are used up. Regions begin at multiples of 128 bytes."""
        if self.used + count > self.ints.numel():
            return None
        region = self.ints[self.used : self.used + count]
        self.used += -(-count // 32) * 32
        return region


_POOLS: dict[torch.device, _Pool] = {}


def zeroed_ints(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros for the next launch on the current stream, which must leave them at zero."""
    if device.type != "cuda":
        return torch.zeros(count, device=device, dtype=torch.int32)
    capturing = torch.cuda.is_current_stream_capturing()
    pool = _POOLS.get(device)
    if pool is None and not capturing:
        pool = _POOLS[device] = _Pool(torch.zeros(POOL_INTS, device=device, dtype=torch.int32))
    region = None
    if pool is not None and capturing:
        region = pool.cut(count)
    elif pool is not None:
        region = _of_stream(pool, device, count)
    return torch.zeros(count, device=device, dtype=torch.int32) if region is None else region


def _of_stream(pool: _Pool, device: torch.device, count: int) -> torch.Tensor:
    stream = torch.cuda.current_stream(device).cuda_stream
    region = pool.of_stream.get(stream)
    if region is None or region.numel() < count:
        region = torch.zeros(max(count, LEAST_INTS), device=device, dtype=torch.int32)
        pool.of_stream[stream] = region
    return region
