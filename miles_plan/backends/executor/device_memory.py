"""Memory of a GPU as its driver counts it, all processes together, and the peak while something runs.

Read through NVML's C library, which is there wherever the driver is: no context is made on the GPU, so looking takes no memory.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

SAMPLE_S = 0.005


class _Memory(ctypes.Structure):
    """nvmlMemory_v2_t, bytes: unlike the first version it counts what the driver keeps for itself apart from `used`."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of one GPU. used is what processes hold, their contexts too; what the driver keeps for itself is not in it."""

    total_bytes: int
    used_bytes: int


class DeviceMemoryError(RuntimeError):
    """There is no NVIDIA driver here, or it knows no such GPU."""


@lru_cache(maxsize=1)
def _nvml() -> Any:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise DeviceMemoryError("no NVIDIA driver: libnvidia-ml.so.1 cannot be loaded") from error
    if library.nvmlInit_v2():
        raise DeviceMemoryError("the NVIDIA driver does not answer (nvmlInit failed)")
    return library


@lru_cache(maxsize=64)
def _handle(gpu: str) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    if gpu.isdigit():
        failed = _nvml().nvmlDeviceGetHandleByIndex_v2(int(gpu), ctypes.byref(handle))
    else:
        failed = _nvml().nvmlDeviceGetHandleByUUID(gpu.encode(), ctypes.byref(handle))
    if failed:
        raise DeviceMemoryError(f"the NVIDIA driver knows no GPU '{gpu}'")
    return handle


def device_memory(gpu: str) -> DeviceMemory:
    """Of the GPU with this number or UUID, as CUDA_VISIBLE_DEVICES names it. DeviceMemoryError where there is none."""
    memory = _Memory(version=ctypes.sizeof(_Memory) | 2 << 24)
    if _nvml().nvmlDeviceGetMemoryInfo_v2(_handle(gpu), ctypes.byref(memory)):
        raise DeviceMemoryError(f"the NVIDIA driver gives no memory of GPU '{gpu}'")
    return DeviceMemory(total_bytes=int(memory.total), used_bytes=int(memory.used))


def visible_gpus() -> Sequence[str]:
    """The GPUs that this process may use, empty where there is no driver or none may be used."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each.strip() for each in named.split(",") if each.strip()]
    try:
        count = ctypes.c_uint()
        _nvml().nvmlDeviceGetCount_v2(ctypes.byref(count))
    except DeviceMemoryError:
        return []
    return [str(index) for index in range(count.value)]


@dataclass
class Peak:
    """Most bytes in use on a GPU while it was watched; 0 where there is none to watch."""

    used_bytes: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def look(self, gpu: str) -> None:
        """Take a sample."""
        self.used_bytes = max(self.used_bytes, device_memory(gpu).used_bytes)

    def _watch(self, gpu: str) -> None:
        while not self._over.wait(SAMPLE_S):
            self.look(gpu)


@contextmanager
def watched(gpu: str | None) -> Iterator[Peak]:
    """Watch a GPU in a thread for as long as the block runs: a sample every 5 ms, and one at each end."""
    peak = Peak()
    if gpu is None:
        yield peak
        return
    peak.look(gpu)
    thread = threading.Thread(target=peak._watch, args=(gpu,), daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        peak._over.set()
        thread.join()
        peak.look(gpu)
