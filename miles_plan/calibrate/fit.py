"""From points to the constants of a profile: each is what the cost model's own formula needs to give the measured seconds.

Pure arithmetic, so that known constants are recovered from synthetic points. A constant without points is left out; a
constant that cannot be right, or whose repetitions scatter, is a problem, and a profile with problems is not written.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from miles_plan.calibrate.points import AttentionPoint, CollectivePoint, GemmPoint, GroupedGemmPoint, Measurements
from miles_plan.catalog.gpus import Gpu
from miles_plan.cost.layer_time import BACKWARD_ATTENTION_FLOPS, K_RAMP, TILE_M, wave_fraction

REFERENCE_EAGER_LAUNCH_S = 7.3e-6
"""Host time of an eager launch on the kind of machine whose layer launches `cost/layer_time.py` holds: the median of three
H200 guests (6.0, 7.3 and 10.0 us; docs/calibration.md)."""
STREAM_SHARE = 0.964
"""What norms, rotary and optimizer kernels reach of a plain copy, scale or add (H200: 0.85 in Megatron runs, 0.881 here)."""
GROUPED_SHARE = 0.70
"""What a trainer's expert products, a loop over the experts, reach of torch's grouped kernel (H200: 0.70 over 0.995)."""
FEWEST_RANKS = 4
"""GPUs whose collectives stand for those of a node: two reach less of their links (H200 all-gather: 0.60 of two, 0.72 of
four)."""
STREAM_SHARE = 0.955
"""What norms, rotary and optimizer kernels reach of a plain copy, scale or add (H200: 0.85 in the Megatron runs, 0.89 here)."""
GROUPED_SHARE = 0.69
"""What a trainer's expert products, a loop over the experts, reach of torch's grouped kernel (H200: 0.70 over 1.015)."""
LATENCY_BYTES = 1 << 20
"""Buffers up to which a collective's time is mostly latency."""
LARGEST_SPREAD = 0.25
"""Interquartile range over median of a measurement's repetitions, above which something else ran too."""
LARGEST_MISFIT = 0.35
"""Median relative distance of the points from a fitted line, above which the formula does not describe this machine."""
COMPUTE_BOUND = 1.5
"""FLOP time over byte time of the products that the reached rate is read from."""

_FRACTION = (0.02, 1.05)
_LIMITS: Mapping[str, tuple[float, float]] = {
    "gemm_fraction": (0.05, 1.05),
    "grouped_gemm_fraction": (0.05, 1.5),
    "attention_forward_fraction": _FRACTION,
    "attention_backward_fraction": _FRACTION,
    "hbm_fraction": (0.1, 1.05),
    "nvlink_bus_fraction": _FRACTION,
    "nvlink_latency_s": (1e-6, 1e-3),
    "kernel_launch_s": (2e-7, 1e-4),
    "host_scale": (0.1, 20.0),
    "host_to_device_bytes_per_s": (1e9, 1e12),
    "device_to_host_bytes_per_s": (1e9, 1e12),
    "pin_bytes_per_s": (1e8, 1e12),
    "context_bytes": (5e7, 8e9),
    "communicator_bytes": (0.0, 16e9),
    "next_communicator_bytes": (0.0, 16e9),
    "floor_s": (2e-7, 1e-3),
    "op_hbm_fraction": (0.05, 1.2),
    "op_peak_fraction": (0.02, 1.2),
}
"""What a working machine can give: beyond its datasheet by more than rounding, or a fiftieth of it, is a mistake."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Constants by name, nested as a profile nests them, and why they should not be used, if so."""

    constants: dict[str, Any]
    problems: tuple[str, ...]


class Repeated(Protocol):
    """A point with the scatter of its repetitions."""

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        ...


def fit(gpu: Gpu, found: Measurements) -> Fit:
    """The constants that `found` gives for a machine with GPUs of this kind."""
    constants: dict[str, Any] = {}
    problems = list(_decode_ops(gpu, found, constants))
    launch_s = float(constants.get("kernel_launch_s", gpu.launch_s))
    _host(found, constants)
    _streams(gpu, found, constants)
    _host_copies(found, constants)
    _products(gpu, found, launch_s, constants)
    _attention(gpu, found, constants)
    _collectives(gpu, found, constants)
    for point in found.memory:
        constants[f"{point.what}_bytes"] = float(point.size_bytes)
    return Fit(_rounded(constants), (*problems, *_scattered(found), *_out_of_range(constants)))


def names_of(constants: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """The constants' dotted names, two levels at most (`gemm_fraction.bf16`, `decode_ops.attention`)."""
    for name, value in constants.items():
        if isinstance(value, Mapping) and not above:
            yield from names_of(value, f"{name}.")
        else:
            yield f"{above}{name}"


def _host(found: Measurements, constants: dict[str, Any]) -> None:
    eager = [point.seconds for point in found.launches if point.way == "eager_host"]
    if eager:
        constants["host_scale"] = statistics.median(eager) / REFERENCE_EAGER_LAUNCH_S


def _streams(gpu: Gpu, found: Measurements, constants: dict[str, Any]) -> None:
    if found.streams:
        reached = [point.moved_bytes / point.seconds / gpu.hbm_bytes_per_s for point in found.streams]
        constants["hbm_fraction"] = STREAM_SHARE * statistics.median(reached)


def _host_copies(found: Measurements, constants: dict[str, Any]) -> None:
    """The largest copy each way: smaller ones pay latency."""
    for direction in ("host_to_device", "device_to_host", "pin"):
        points = [point for point in found.host_copies if point.direction == direction]
        if points:
            largest = max(points, key=lambda point: point.size_bytes)
            constants[f"{direction}_bytes_per_s"] = largest.size_bytes / largest.seconds


def _products(gpu: Gpu, found: Measurements, launch_s: float, constants: dict[str, Any]) -> None:
    """The reached rate of large products, sustained, net of the wave and ramp losses that the cost model counts itself."""
    fractions: dict[str, float] = {}
    for precision in sorted({point.precision for point in found.gemms}):
        points = [point for point in found.gemms if point.precision == precision and point.state == "sustained"]
        reached = [_gemm_fraction(gpu, point, launch_s) for point in points if _compute_bound(gpu, point)]
        if reached:
            fractions[precision] = statistics.median(reached)
    if fractions:
        constants["gemm_fraction"] = fractions
    if found.grouped_gemms and "bf16" in fractions:
        grouped = [_grouped_fraction(gpu, point, fractions["bf16"], launch_s) for point in found.grouped_gemms]
        constants["grouped_gemm_fraction"] = GROUPED_SHARE * statistics.median(grouped)


def _compute_bound(gpu: Gpu, point: GemmPoint) -> bool:
    size = 1.0 if point.precision == "fp8" else 2.0
    moved = size * (point.m * point.k + point.n * point.k) + 2.0 * point.m * point.n
    flops = 2.0 * point.m * point.n * point.k
    return flops / gpu.rate(point.precision) > COMPUTE_BOUND * moved / gpu.hbm_bytes_per_s


def _gemm_fraction(gpu: Gpu, point: GemmPoint, launch_s: float) -> float:
    usable = float(wave_fraction(point.m, point.n, gpu.sms)) * point.k / (point.k + K_RAMP)
    ideal = 2.0 * point.m * point.n * point.k / (gpu.rate(point.precision) * usable)
    return ideal / max(point.seconds - launch_s, 1e-9)


def _grouped_fraction(gpu: Gpu, point: GroupedGemmPoint, dense_fraction: float, launch_s: float) -> float:
    rows = point.experts * point.m
    fill = point.m / (point.m + TILE_M / 2)
    usable = fill * float(wave_fraction(rows, point.n, gpu.sms)) * point.k / (point.k + K_RAMP)
    ideal = 2.0 * rows * point.n * point.k / (gpu.rate("bf16") * dense_fraction * usable)
    return ideal / max(point.seconds - launch_s, 1e-9)


def _attention(gpu: Gpu, found: Measurements, constants: dict[str, Any]) -> None:
    for phase, work in (("forward", 1.0), ("backward", BACKWARD_ATTENTION_FLOPS)):
        points = [point for point in found.attention if point.phase == phase]
        if points:
            reached = [work * _causal_flops(point) / gpu.rate("bf16") / point.seconds for point in points]
            constants[f"attention_{phase}_fraction"] = statistics.median(reached)


def _causal_flops(point: AttentionPoint) -> float:
    """Two products of a score each way: 4 FLOPs a head dimension and causal pair."""
    return 4.0 * point.heads * point.head_dim * point.batch * point.tokens * (point.tokens + 1) / 2.0


def _collectives(gpu: Gpu, found: Measurements, constants: dict[str, Any]) -> None:
    """Bus bandwidth from the largest buffer; latency is what the small ones take beyond their bytes at that bandwidth.

    Of too few GPUs only the link itself is taken: what one sends another.
    """
    fractions, latencies = {}, []
    for op in sorted({point.op for point in found.collectives}):
        points = sorted((point for point in found.collectives if point.op == op), key=lambda point: point.size_bytes)
        if op != "p2p" and points[-1].ranks < min(FEWEST_RANKS, gpu.gpus_per_node):
            continue
        bytes_per_s = bus_bytes(points[-1]) / points[-1].seconds
        fractions[op] = bytes_per_s / gpu.nvlink_bytes_per_s
        small = [point for point in points if point.size_bytes <= LATENCY_BYTES]
        if op != "p2p" and small:
            latencies.append(min(point.seconds - bus_bytes(point) / bytes_per_s for point in small))
    if fractions:
        constants["nvlink_bus_fraction"] = fractions
    if latencies:
        constants["nvlink_latency_s"] = statistics.median(latencies)


def bus_bytes(point: CollectivePoint) -> float:
    """Bytes that each GPU's link carries one way (as nccl-tests counts bus bandwidth)."""
    others = (point.ranks - 1) / point.ranks
    return point.size_bytes * {"all_reduce": 2.0 * others, "p2p": 1.0}.get(point.op, others)


def _decode_ops(gpu: Gpu, found: Measurements, constants: dict[str, Any]) -> Iterator[str]:
    """Kernels of a decode step as floor + bytes + FLOPs, each at a rate of its own; misfits are problems.

    Only of kernels that the engines run too: 16-bit products are the library's there, 8-bit ones quantise in blocks, which
    torch has no kernel for, so those stay as shipped. A product's floor is also what one takes in training.
    """
    ops: dict[str, dict[str, float]] = {}
    small = [point for point in found.gemms if point.state == "decode" and point.precision == "bf16"]
    if small:
        moved = [2.0 * (each.n * each.k + each.m * each.k + each.m * each.n) for each in small]
        flops = [2.0 * each.m * each.n * each.k for each in small]
        yield from _line(gpu, "product_bf16", moved, flops, [each.seconds for each in small], ops)
    decode = [point for point in found.attention if point.phase == "decode"]
    if decode:
        moved = [4.0 * each.batch * each.kv_heads * each.tokens * each.head_dim for each in decode]
        yield from _line(gpu, "attention", moved, None, [each.seconds for each in decode], ops)
    if "product_bf16" in ops:
        constants["kernel_launch_s"] = ops["product_bf16"]["floor_s"]
    if ops:
        constants["decode_ops"] = ops


def _line(
    gpu: Gpu,
    name: str,
    moved_bytes: Sequence[float],
    flops: Sequence[float] | None,
    seconds: Sequence[float],
    ops: dict[str, dict[str, float]],
) -> Iterator[str]:
    """seconds = floor + bytes / (bandwidth x h) + FLOPs / (rate x p) by least squares of relative errors, no part negative."""
    columns = [np.ones(len(seconds)), np.asarray(moved_bytes) / gpu.hbm_bytes_per_s]
    if flops is not None:
        columns.append(np.asarray(flops) / gpu.rate("bf16"))
    if len(seconds) < len(columns):
        return
    times = np.asarray(seconds)
    floor, per_byte, *rest = _not_negative(np.stack(columns, axis=1), times)
    if per_byte <= 0:
        yield f"decode_ops.{name}: its seconds do not grow with the bytes it reads"
        return
    found = np.stack(columns, axis=1) @ np.asarray([floor, per_byte, *rest])
    misfit = float(np.median(np.abs(found / times - 1.0)))
    if misfit > LARGEST_MISFIT:
        yield f"decode_ops.{name}: half of the points lie more than {misfit:.0%} from the fitted line"
    # FLOPs that cost nothing beside the bytes run at the peak, as far as these points can tell
    peak = min(1.0, 1.0 / rest[0]) if rest and rest[0] > 0 else 1.0
    ops[name] = {"floor_s": floor, "hbm_fraction": 1.0 / per_byte, "peak_fraction": peak}


def _not_negative(columns: NDArray[np.float64], times: NDArray[np.float64]) -> list[float]:
    """Least squares of relative errors with coefficients >= 0: of all choices of nonzero ones, the best that obeys."""
    weighted, target, count = columns / times[:, None], np.ones(len(times)), columns.shape[1]
    best, least = np.zeros(count), float("inf")
    for kept in itertools.chain.from_iterable(itertools.combinations(range(count), n) for n in range(1, count + 1)):
        some, *_ = np.linalg.lstsq(weighted[:, kept], target, rcond=None)
        error = float(np.sum((weighted[:, kept] @ some - target) ** 2))
        if np.all(some >= 0) and error < least * (1 - 1e-9):
            best, least = np.zeros(count), error
            best[list(kept)] = some
    return [float(each) for each in best]


def _scattered(found: Measurements) -> Iterator[str]:
    kinds: dict[str, Sequence[Repeated]] = {
        "device memory bandwidth": found.streams,
        "copies from and to the host": found.host_copies,
        "matrix products": found.gemms,
        "products of experts": found.grouped_gemms,
        "attention": found.attention,
        "collectives": found.collectives,
    }
    for what, points in kinds.items():
        spread = statistics.median(point.spread for point in points) if points else 0.0
        if spread > LARGEST_SPREAD:
            yield f"{what}: repetitions differ by {spread:.0%}, at most {LARGEST_SPREAD:.0%} is usable"


def _out_of_range(constants: Mapping[str, Any]) -> Iterator[str]:
    for name, limits, value in _leaves(constants):
        low, high = limits
        if not low <= value <= high:
            yield f"{name} = {value:.4g} cannot be right: a working machine gives {low:g} to {high:g}"


def _leaves(constants: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float], float]]:
    for name, value in constants.items():
        if name == "decode_ops":
            for op, costs in value.items():
                for part, each in costs.items():
                    yield f"decode_ops.{op}.{part}", _LIMITS[part if part == "floor_s" else f"op_{part}"], each
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{part}", _LIMITS[name], each) for part, each in value.items())
        else:
            yield name, _LIMITS[name], value


def _rounded(constants: Any) -> Any:
    """Four digits: more would claim a precision that no machine repeats."""
    if isinstance(constants, Mapping):
        return {name: _rounded(value) for name, value in constants.items()}
    return float(f"{constants:.4g}")
