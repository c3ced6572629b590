"""All measurements of one machine, one after another, within about the time that is asked for."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from miles_plan.calibrate.attention import AttentionShape, measure_attention, measure_decode_attention
from miles_plan.calibrate.collectives import CollectivesFailedError, measure_collectives
from miles_plan.calibrate.context_memory import measure_context
from miles_plan.calibrate.copies import measure_host_copies, measure_streams
from miles_plan.calibrate.gemm import Shape, measure_decode_gemms, measure_gemms
from miles_plan.calibrate.grouped_gemm import GroupedShape, measure_grouped_gemms
from miles_plan.calibrate.launches import measure_launches
from miles_plan.calibrate.points import Machine, Measurements

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The sizes that are measured. Shapes are those of dense and expert layers of 8 to 70 billion-parameter models."""

    stream_bytes: int = 1024 * MIB
    host_copy_bytes: tuple[int, ...] = (16 * MIB, 256 * MIB, 1024 * MIB)
    gemms: tuple[Shape, ...] = (
        (8192, 8192, 8192),
        (4096, 4096, 4096),
        (8192, 4096, 4096),
        (8192, 28672, 4096),
        (8192, 4096, 14336),
        (16384, 2048, 2048),
        (16384, 12288, 2048),
        (32768, 1280, 8192),
    )
    decode_gemms: tuple[Shape, ...] = tuple(
        (m, n, k) for n, k in ((2048, 2048), (6144, 4096), (28672, 4096), (4096, 14336)) for m in (1, 16, 64, 256)
    )
    grouped_gemms: tuple[GroupedShape, ...] = (
        (16, 1024, 1536, 2048),
        (16, 4096, 1536, 2048),
        (16, 2048, 2048, 768),
        (8, 4096, 28672, 4096),
        (32, 512, 4096, 7168),
    )
    attention: tuple[AttentionShape, ...] = ((4, 2048, 32, 8, 128), (2, 8192, 32, 8, 128), (1, 16384, 32, 8, 128))
    decode_attention: tuple[AttentionShape, ...] = (
        (8, 256, 32, 8, 128),
        (64, 2048, 32, 8, 128),
        (128, 4096, 32, 8, 128),
        (256, 2048, 32, 4, 128),
    )
    collective_bytes: tuple[int, ...] = (64 << 10, 1 * MIB, 16 * MIB, 256 * MIB, 1024 * MIB)


HEAT_SHARE = 0.08
"""Part of the time asked for that the chip is heated for, per number format; the parts below leave the rest to drawing inputs,
loading kernels and starting processes."""


def measure(device: torch.device, seconds: float, grid: Grid, tell: Callable[[str], None]) -> Measurements:
    """Measure everything that this machine can do; `tell` is called with the name of each part as it starts.

    A part that fails on this machine (collectives that cannot start) is told and left out: its constants stay as shipped.
    """
    found = Measurements()
    tell("memory of a CUDA context")
    found = replace(found, memory=measure_context(device))
    tell("launches")
    found = replace(found, launches=measure_launches(device, 0.02 * seconds))
    tell("device memory bandwidth")
    found = replace(found, streams=measure_streams(device, grid.stream_bytes, 0.04 * seconds))
    tell("copies from and to the host")
    found = replace(found, host_copies=measure_host_copies(device, grid.host_copy_bytes, 0.06 * seconds))
    tell("small products of decoding")
    small = measure_decode_gemms(device, grid.decode_gemms, 0.06 * seconds)
    tell("attention of decoding")
    attention = measure_decode_attention(device, grid.decode_attention, 0.05 * seconds)
    tell("large products under load")
    large = measure_gemms(device, grid.gemms, HEAT_SHARE * seconds, 0.12 * seconds)
    tell("products of experts")
    found = replace(found, grouped_gemms=measure_grouped_gemms(device, grid.grouped_gemms, 0.05 * seconds))
    tell("attention of training")
    attention = (*measure_attention(device, grid.attention, 0.1 * seconds), *attention)
    found = replace(found, gemms=(*large, *small), attention=attention)
    return _with_collectives(found, device, grid, 0.15 * seconds, tell)


def _with_collectives(
    found: Measurements, device: torch.device, grid: Grid, budget_s: float, tell: Callable[[str], None]
) -> Measurements:
    ranks = torch.cuda.device_count() if device.type == "cuda" else 1
    if ranks < 2:
        tell("collectives: left out, one GPU is visible")
        return found
    tell(f"collectives of {ranks} GPUs")
    torch.cuda.empty_cache()
    try:
        points, memory = measure_collectives(device.type, ranks, grid.collective_bytes, budget_s)
    except CollectivesFailedError as failed:
        tell(f"collectives: left out, {failed}")
        return found
    return replace(found, collectives=points, memory=(*found.memory, *memory))


def machine_of(device: torch.device) -> Machine:
    """What is measured: the device by its driver's name, the processor, and the versions that decide the figures."""
    on_cuda = device.type == "cuda"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if on_cuda:
        versions["cuda" if torch.version.hip is None else "hip"] = str(torch.version.cuda or torch.version.hip)
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        versions["driver"] = _driver()
    return Machine(
        device=torch.cuda.get_device_name(device) if on_cuda else "cpu",
        num_gpus=torch.cuda.device_count() if on_cuda else 0,
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if on_cuda else 0,
        processor=_processor(),
        versions=versions,
    )


def _driver() -> str:
    """The driver's release from the kernel module, which needs no tool."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
