"""What a machine was measured to reach, as a JSON file that `calibrate` writes and every cost model reads.

A profile holds fractions of datasheet peaks and a few latencies, so one measured on an H200 carries over to its
relatives; `profile_for` picks the nearest and says so in `basis`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from miles_plan.catalog.gpus import Gpu

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """Measured efficiencies of one kind of machine.

    gemm_fraction: large matrix products over dense peak, by precision; grouped_gemm_fraction: experts over that again.
    attention_*_fraction: flash attention over bf16 peak. hbm_fraction: streaming kernels over datasheet bandwidth.
    *_bus_fraction: bus bandwidth of large collectives over the link's datasheet figure, by collective.
    *_latency_s: time of an empty collective. copy figures are bytes per second of pinned host copies. Memory figures
    are bytes the driver takes outside the allocator.
    """

    gpu: str
    basis: Literal["measured", "calibrated", "roofline"]
    date: str
    source: str
    gemm_fraction: Mapping[str, float]
    grouped_gemm_fraction: float
    attention_forward_fraction: float
    attention_backward_fraction: float
    hbm_fraction: float
    nvlink_bus_fraction: Mapping[str, float]
    nvlink_latency_s: float
    rdma_bus_fraction: Mapping[str, float]
    rdma_latency_s: float
    kernel_launch_s: float
    host_to_device_bytes_per_s: float
    device_to_host_bytes_per_s: float
    pin_bytes_per_s: float
    ipc_open_s: float
    context_bytes: float
    communicator_bytes: float
    next_communicator_bytes: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            values = value.values() if isinstance(value, Mapping) else [value]
            if any(isinstance(each, float) and not each >= 0 for each in values):
                raise ValueError(f"hardware profile of {self.gpu}: {name} is negative or not a number")


def load_profile(path: Path) -> HardwareProfile:
    """Read a profile file.

    Raises:
        ValueError: not a profile, or of another schema.
    """
    return _parse(path.read_text(encoding="utf-8"), str(path))


def save_profile(profile: HardwareProfile, path: Path) -> None:
    """Write a profile file."""
    path.write_text(json.dumps({"schema": SCHEMA, **asdict(profile)}, indent=1) + "\n", encoding="utf-8")


def default_profile() -> HardwareProfile:
    """The shipped H200 profile."""
    return _packaged("h200")


def profile_for(gpu: Gpu) -> HardwareProfile:
    """The shipped profile of a GPU, or the H200's fractions applied to its datasheet, marked as a roofline."""
    base = default_profile()
    if gpu.name == base.gpu:
        return base
    changes: dict[str, Any] = _FAMILY.get(gpu.name, {})
    return replace(
        base,
        gpu=gpu.name,
        basis="roofline" if gpu.name not in _HOPPER else "calibrated",
        source=f"fractions of {base.gpu} ({base.source}) on the datasheet of {gpu.name}",
        kernel_launch_s=gpu.launch_s,
        **{
            "host_to_device_bytes_per_s": gpu.pcie_bytes_per_s,
            "device_to_host_bytes_per_s": gpu.pcie_bytes_per_s,
            **changes,
        },
    )


_HOPPER = frozenset({"h100", "h800", "h20", "gh200"})
_FAMILY: dict[str, dict[str, Any]] = {
    "cpu": {
        "gemm_fraction": {"fp32": 0.6, "bf16": 0.4, "fp16": 0.4},
        "grouped_gemm_fraction": 0.5,
        "attention_forward_fraction": 0.3,
        "attention_backward_fraction": 0.3,
        "context_bytes": 0.0,
        "communicator_bytes": 0.0,
        "next_communicator_bytes": 0.0,
        "nvlink_latency_s": 2.0e-4,
    }
}


@lru_cache(maxsize=8)
def _packaged(name: str) -> HardwareProfile:
    source = files("miles_plan.cost").joinpath("profiles", f"{name}.json")
    return _parse(source.read_text(encoding="utf-8"), name)


def _parse(text: str, place: str) -> HardwareProfile:
    data = json.loads(text)
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise ValueError(f"{place} is not a hardware profile of schema {SCHEMA}")
    try:
        return HardwareProfile(**data)
    except TypeError as error:
        raise ValueError(f"{place}: {error}") from error
