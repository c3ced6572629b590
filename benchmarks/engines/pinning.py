"""What page-locked host memory costs: PyTorch's allocator against the trainers' (`backends.training.pinned_memory`).

    python -m benchmarks.engines.pinning OUT.json [--gib 16]

Seconds until the memory is there, what the machine has less of it by, and the rate of a copy to and from the device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

GIB = 1 << 30
COPIED_BYTES = 4 * GIB


def available_bytes() -> int:
    """Of the machine's memory, as Linux counts it."""
    line = next(each for each in Path("/proc/meminfo").read_text().splitlines() if each.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def copy_bytes_per_s(source: Any, target: Any) -> float:
    """Of one copy, which is waited for."""
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    target.copy_(source)
    torch.cuda.synchronize()
    return float(source.numel() / (time.perf_counter() - began))


def measure(name: str, make: Callable[[], Any]) -> dict[str, Any]:
    """One way of getting it. make: gives a tensor of bytes."""
    import torch

    before, began = available_bytes(), time.perf_counter()
    host = make()
    seconds, taken = time.perf_counter() - began, before - available_bytes()
    there = torch.empty(min(COPIED_BYTES, host.numel()), dtype=torch.uint8, device="cuda")
    part = host[: there.numel()]
    rates = {"to_device_bytes_per_s": copy_bytes_per_s(part, there), "to_host_bytes_per_s": copy_bytes_per_s(there, part)}
    return {"way": name, "size_bytes": host.numel(), "seconds": seconds, "taken_bytes": taken, **rates}


def main() -> int:
    """Measure, print, write."""
    import torch

    from miles_plan.backends.training.pinned_memory import PinnedMemory

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gib", type=float, default=16.0)
    asked = parser.parse_args()
    size = int(asked.gib * GIB) + 4096  # a little above a power of two, where rounding costs most
    torch.zeros(1, device="cuda")
    held: list[PinnedMemory] = []

    def ours() -> Any:
        held.append(PinnedMemory(size))
        return held[0].tensor

    rows = [measure("touched by threads, then locked", ours)]
    held[0].close()
    rows.append(measure("pin_memory=True", lambda: torch.empty(size, dtype=torch.uint8, pin_memory=True)))
    for row in rows:
        print(f"{row['way']:<32} {row['seconds']:6.2f} s, {row['taken_bytes'] / GIB:6.2f} GiB for {size / GIB:.2f}")
    asked.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
