"""Round places for ticks, linear and logarithmic, and the mapping from values to pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from miles_plan.report.units import Scale, number_text, scale_for

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from low to high over pixels from begin to end (end may lie before begin: y grows downwards)."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value, kept within the axis."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        place = math.log10(max(value, self.low)) if self.log else value
        share = (place - low) / (high - low) if high > low else 0.5
        return self.begin + min(1.0, max(0.0, share)) * (self.end - self.begin)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values within [low, high]."""
    if not high > low:
        return [low]
    step = round_step((high - low) / max(1, count))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [at * step for at in range(first, last + 1)]


def round_step(rough: float) -> float:
    """The round number nearest above `rough`: 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in STEPS if step * power >= rough * (1 - 1e-9))


def time_ticks(high_s: float, count: int = 6) -> list[float]:
    """Ticks from 0 to `high_s` at times people count in: seconds, minutes, hours."""
    rough = high_s / max(1, count)
    step = next((float(step) for step in TIME_STEPS_S if step >= rough), None) if rough > 0.5 else None
    step = step or (round_step(rough) if rough > 0 else 1.0)
    return [at * step for at in range(int(high_s / step + 1e-9) + 1)]


def byte_ticks(high_bytes: float, count: int = 6) -> list[float]:
    """Ticks from 0 to `high_bytes` at powers of two or their simple multiples, in the unit the values are written in."""
    unit = scale_for("bytes", high_bytes).divisor
    return [tick * unit for tick in linear_ticks(0, high_bytes / unit, count)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high]; with 2 and 5 in between where there are fewer than three."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    powers = [10.0**power for power in range(first, last + 1) if low * 0.999 <= 10.0**power <= high * 1.001]
    if len(powers) >= 3:
        return powers
    dense = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    return [tick for tick in dense if low * 0.999 <= tick <= high * 1.001] or [low, high]


def padded_range(low: float, high: float) -> tuple[float, float]:
    """The range with a little air on both sides; a single value gets a range around it; 0 stays the edge if it is one."""
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return (0.0, high + pad) if low == 0 else (low - pad, high + pad)
    pad = 0.06 * (high - low)
    return (0.0 if 0 <= low < pad * 4 else low - pad), high + pad


def tick_texts(ticks: Sequence[float], scale: Scale) -> list[str]:
    """The labels of an axis's ticks, without their unit, with as many figures as tell them apart."""
    for digits in range(3, 9):
        words = [number_text(tick / scale.divisor, digits) for tick in ticks]
        if len(set(words)) == len(words):
            break
    return words if ticks else []
