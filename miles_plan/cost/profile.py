"""What a machine was measured to reach, as a JSON file that every cost model reads.

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
class OpCost:
    """One kind of decode kernel takes floor_s + bytes / (hbm_fraction x bandwidth) + FLOPs / (peak_fraction x rate)."""

    floor_s: float
    hbm_fraction: float
    peak_fraction: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """Measured efficiencies of one kind of machine.

    gemm_fraction: large matrix products over dense peak, by precision; grouped_gemm_fraction: experts over that again.
    attention_*_fraction: flash attention over bf16 peak. hbm_fraction: streaming kernels over datasheet bandwidth.
    *_bus_fraction: bus bandwidth of large collectives over the link's datasheet figure, by collective.
    scan_fraction: chunked linear attention and state-space kernels over bf16 peak. host_scale: launch time of the host
    over the measured machine's. *_latency_s: time of an empty collective. Copy figures are bytes per second of pinned
    host copies. Memory figures are bytes the driver takes outside the allocator. prefill_fraction: products of an
    engine's prefill over dense peak. decode_ops: what one kernel of a decode step costs, by kind and precision.
    """

    gpu: str
    basis: Literal["measured", "calibrated", "roofline"]
    date: str
    source: str
    gemm_fraction: Mapping[str, float]
    grouped_gemm_fraction: float
    attention_forward_fraction: float
    attention_backward_fraction: float
    scan_fraction: float
    hbm_fraction: float
    nvlink_bus_fraction: Mapping[str, float]
    nvlink_latency_s: float
    rdma_bus_fraction: Mapping[str, float]
    rdma_latency_s: float
    kernel_launch_s: float
    host_scale: float
    host_to_device_bytes_per_s: float
    device_to_host_bytes_per_s: float
    pin_bytes_per_s: float
    ipc_open_s: float
    context_bytes: float
    communicator_bytes: float
    next_communicator_bytes: float
    prefill_fraction: float
    decode_ops: Mapping[str, OpCost]

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            values = list(value.values()) if isinstance(value, Mapping) else [value]
            values = [part for each in values for part in (each.values() if isinstance(each, Mapping) else [each])]
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


_NEAREST = {
    "h800": "h100",
    "h20": "h200",
    "gh200": "h200",
    "mi300x": "h200",
    "mi325x": "h200",
    "mi350x": "b200",
    "mi355x": "b200",
    "cpu": "h200",
}
"""GPUs without a profile of their own, and whose fractions they borrow."""


def profile_for(gpu: Gpu) -> HardwareProfile:
    """The shipped profile of a GPU, or the nearest one's fractions on its datasheet, marked as a roofline."""
    nearest = _NEAREST.get(gpu.name)
    if nearest is None:
        return _packaged(gpu.name if gpu.name in _SHIPPED else "h200")
    base = _packaged(nearest)
    source = f"fractions of {base.gpu} ({base.source}) on the datasheet of {gpu.name}"
    own = {"host_to_device_bytes_per_s": gpu.pcie_bytes_per_s, "device_to_host_bytes_per_s": gpu.pcie_bytes_per_s}
    changes: dict[str, Any] = _CPU if gpu.name == "cpu" else {}
    return replace(base, gpu=gpu.name, basis="roofline", source=source, kernel_launch_s=gpu.launch_s, **own | changes)


_SHIPPED = frozenset({"a100", "h100", "h100-500w", "h200", "b200", "b300", "gb200", "gb300"})
_CPU: dict[str, Any] = {
    "gemm_fraction": {"fp32": 0.6, "bf16": 0.4, "fp16": 0.4},
    "grouped_gemm_fraction": 0.5,
    "attention_forward_fraction": 0.3,
    "attention_backward_fraction": 0.3,
    "context_bytes": 0.0,
    "communicator_bytes": 0.0,
    "next_communicator_bytes": 0.0,
    "nvlink_latency_s": 2.0e-4,
}


@lru_cache(maxsize=16)
def _packaged(name: str) -> HardwareProfile:
    source = files("miles_plan.cost").joinpath("profiles", f"{name}.json")
    return _parse(source.read_text(encoding="utf-8"), name)


def _parse(text: str, place: str) -> HardwareProfile:
    data = json.loads(text)
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise ValueError(f"{place} is not a hardware profile of schema {SCHEMA}")
    try:
        ops = {name: OpCost(**cost) for name, cost in data.pop("decode_ops").items()}
        return HardwareProfile(decode_ops=ops, **data)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from error
