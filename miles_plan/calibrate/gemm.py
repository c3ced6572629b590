"""Matrix products through the vendor's library: large ones under sustained load, small ones as decoding launches them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch

from miles_plan.calibrate.points import GemmPoint, GemmState
from miles_plan.calibrate.timing import Call, Timing, rotations, time_calls

Shape = tuple[int, int, int]


def measure_gemms(device: torch.device, shapes: Sequence[Shape], heat_s: float, budget_s: float) -> tuple[GemmPoint, ...]:
    """Products of every (m, n, k) in bf16, and in fp8 where the chip has it.

    The first shape is measured before and after heat_s of back-to-back products: a chip at its power limit clocks down, and a
    training step runs there. All other points are taken hot.
    """
    anchor, each_s = shapes[0], budget_s / (2 * len(shapes) + 1)
    cool = _timed(anchor, "bf16", device, each_s)
    found = [_point(anchor, "bf16", "burst", cool)]
    for precision in ("bf16", "fp8") if has_fp8(device) else ("bf16",):
        _heat(_calls(anchor, precision, device), device, heat_s)
        found += [_point(each, precision, "sustained", _timed(each, precision, device, each_s)) for each in shapes]
    return tuple(found)


def measure_decode_gemms(device: torch.device, shapes: Sequence[Shape], budget_s: float) -> tuple[GemmPoint, ...]:
    """Products of few rows, replayed from a CUDA graph, their weights not in any cache."""
    precisions = ("bf16", "fp8") if has_fp8(device) else ("bf16",)
    each_s = budget_s / (len(shapes) * len(precisions))
    return tuple(
        _point(shape, precision, "decode", _timed(shape, precision, device, each_s))
        for precision in precisions
        for shape in shapes
        if precision == "bf16" or shape[0] % 16 == 0  # the library's fp8 products want whole rows of tiles
    )


def has_fp8(device: torch.device) -> bool:
    """Whether torch multiplies 8-bit floats on this device."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)


def _timed(shape: Shape, precision: str, device: torch.device, budget_s: float) -> Timing:
    return time_calls(_calls(shape, precision, device), device, budget_s)


def _point(shape: Shape, precision: str, state: GemmState, timing: Timing) -> GemmPoint:
    m, n, k = shape
    return GemmPoint(m=m, n=n, k=k, precision=precision, state=state, seconds=timing.seconds, spread=timing.spread)


def _calls(shape: Shape, precision: str, device: torch.device) -> list[Call]:
    m, n, k = shape
    element = 1 if precision == "fp8" else 2
    sets = rotations(element * (m * k + n * k) + 2 * m * n)
    rows = [torch.randn(m, k, device=device, dtype=torch.bfloat16) for _ in range(sets)]
    weights = [torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in range(sets)]
    if precision == "fp8":
        one = torch.ones((), device=device, dtype=torch.float32)
        narrow = [(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()) for a, b in zip(rows, weights, strict=True)]
        scaled = partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
        return [partial(scaled, a, b) for a, b in narrow]
    out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
    return [partial(torch.mm, a, b.t(), out=out) for a, b in zip(rows, weights, strict=True)]


def _heat(calls: Sequence[Call], device: torch.device, seconds: float) -> None:
    """Keep the device busy for so long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for call in calls:
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
