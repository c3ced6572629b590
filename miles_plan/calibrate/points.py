"""What was measured: one record a point, as it is kept in a profile file beside the constants that were fitted to it.

seconds is the median over repetitions on rotating inputs; spread is the interquartile range of the repetitions over it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

CollectiveOp = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p"]
AttentionPhase = Literal["forward", "backward", "decode"]
GemmState = Literal["burst", "sustained", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPoint:
    """A kernel that streams `moved_bytes`, read and written, through device memory."""

    kernel: str
    moved_bytes: int
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCopyPoint:
    """A copy between page-locked host memory and the device, or (`pin`) the locking itself."""

    direction: Literal["host_to_device", "device_to_host", "pin"]
    size_bytes: int
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmPoint:
    """(m, k) x (k, n). `state`: burst on a cool chip, sustained under load, decode in a CUDA graph of small products."""

    m: int
    n: int
    k: int
    precision: str
    state: GemmState
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedGemmPoint:
    """`experts` products of (m, k) x (k, n) in one kernel, the same m for each."""

    experts: int
    m: int
    n: int
    k: int
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPoint:
    """Causal attention of `batch` sequences of `tokens`, or one query token a sequence over a cache of `tokens`."""

    phase: AttentionPhase
    backend: str
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPoint:
    """One launch: what the host takes for it (eager), what a replayed graph takes for it, of an empty kernel or a product."""

    way: Literal["eager_host", "graph_kernel", "graph_product"]
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivePoint:
    """A collective of `ranks` GPUs of this machine; size_bytes is the whole buffer, seconds the slowest rank's."""

    op: CollectiveOp
    ranks: int
    size_bytes: int
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPoint:
    """Device memory that `what` takes outside the allocator."""

    what: Literal["context", "communicator", "next_communicator"]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Every point of one calibration."""

    streams: tuple[StreamPoint, ...] = ()
    host_copies: tuple[HostCopyPoint, ...] = ()
    gemms: tuple[GemmPoint, ...] = ()
    grouped_gemms: tuple[GroupedGemmPoint, ...] = ()
    attention: tuple[AttentionPoint, ...] = ()
    launches: tuple[LaunchPoint, ...] = ()
    collectives: tuple[CollectivePoint, ...] = ()
    memory: tuple[MemoryPoint, ...] = ()

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """The points as JSON data, figures to four digits, empty kinds left out."""
        return {name: [_rounded(point) for point in points] for name, points in asdict(self).items() if points}


def _rounded(point: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in point.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was measured: the device as its driver names it, the host, and the versions that decide the figures."""

    device: str
    num_gpus: int
    memory_bytes: int
    processor: str
    versions: dict[str, str] = field(hash=False)
