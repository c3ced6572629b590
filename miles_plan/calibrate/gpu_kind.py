"""Which GPU of the catalog a device is, by its driver's name and its memory."""

from __future__ import annotations

import re

from miles_plan.catalog.gpus import Gpu, find_gpu, gpu_names

MEMORY_TOLERANCE = 0.12
"""Drivers report up to a tenth less than nominal (ECC, reserved), and other models of a name differ by a sixth or more."""

OTHER_BOARDS = frozenset({"pcie", "nvl"})
"""Boards that share a chip's name and memory but not its power, bandwidth and links; the catalog has the SXM and OAM ones."""


def gpu_kind(device_name: str, memory_bytes: int) -> Gpu | None:
    """The catalog's GPU for names such as "NVIDIA H100 80GB HBM3" and "AMD Instinct MI300X"; None for one it lacks."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if words & OTHER_BOARDS:
        return None
    named = [find_gpu(name) for name in gpu_names() if name.split("-")[0] in words]
    close = [gpu for gpu in named if abs(memory_bytes / gpu.memory_bytes - 1.0) <= MEMORY_TOLERANCE]
    return min(close, key=lambda gpu: abs(memory_bytes / gpu.memory_bytes - 1.0), default=None)
