"""What one kind of machine was measured to reach: fractions of datasheet peaks, and latencies and sizes in their own units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

ProfileBasis = Literal["measured", "calibrated", "roofline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCost:
    """One kind of decode kernel takes floor_s + bytes / (hbm_fraction x bandwidth) + FLOPs / (peak_fraction x rate)."""

    floor_s: float
    hbm_fraction: float
    peak_fraction: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredHere:
    """Where a profile of the user's own machine comes from.

    constants: dotted names (`gemm_fraction.bf16`) of those measured; all others are those of `shipped`, the shipped
    profile of this GPU, whose basis was shipped_basis. sha256 is of the file's bytes.
    """

    file: str
    sha256: str
    constants: tuple[str, ...]
    shipped: str
    shipped_basis: ProfileBasis

    def covers(self, names: Iterable[str]) -> bool:
        """Whether every one of these constants was measured; a mapping's name stands for any of its entries."""
        return all(any(each == name or each.startswith(f"{name}.") for each in self.constants) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """Measured efficiencies of one kind of machine.

    gemm_fraction: large matrix products over dense peak, by precision; grouped_gemm_fraction: experts over that again.
    attention_*_fraction: flash attention over bf16 peak. hbm_fraction: streaming kernels over datasheet bandwidth.
    *_bus_fraction: bus bandwidth of large collectives over the link's datasheet figure, by collective.
    scan_fraction: chunked linear attention and state-space kernels over bf16 peak. kernel_launch_s: what a product takes
    beyond its FLOPs or bytes. host_scale: launch time of the host over the measured machine's. *_latency_s: time of an
    empty collective. Copy figures are bytes per second of pinned host copies. Memory figures are bytes the driver takes
    outside the allocator. prefill_fraction: products of an engine's prefill over dense peak. decode_ops: what one kernel of
    a decode step costs, by kind and precision. here: set where a user's machine was measured.
    """

    gpu: str
    basis: ProfileBasis
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
    here: MeasuredHere | None = None

    def basis_of(self, constants: Iterable[str]) -> ProfileBasis:
        """Where a figure that these constants decide comes from: measured only if all of them were."""
        if self.here is None:
            return self.basis
        return "measured" if self.here.covers(constants) else self.here.shipped_basis

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            values = list(value.values()) if isinstance(value, Mapping) else [value]
            values = [part for each in values for part in (each.values() if isinstance(each, Mapping) else [each])]
            if any(isinstance(each, float) and not each >= 0 for each in values):
                raise ValueError(f"hardware profile of {self.gpu}: {name} is negative or not a number")
