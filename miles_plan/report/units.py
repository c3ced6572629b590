"""Numbers as people read them: three figures, a unit, and intervals that share the unit of their upper end."""

from __future__ import annotations

import math
from dataclasses import dataclass

EN_DASH = "\N{EN DASH}"
KIB, MIB, GIB, TIB = 2.0**10, 2.0**20, 2.0**30, 2.0**40


@dataclass(frozen=True, slots=True)
class Scale:
    """A unit to write values in: `divisor` base units, written with `suffix` (which brings its own space)."""

    divisor: float
    suffix: str
    digits: int = 3


def seconds_scale(seconds: float) -> Scale:
    """Milliseconds below 1 s, seconds up to an hour (steps are compared in seconds), then minutes, hours, days."""
    size = abs(seconds)
    if 0 < size < 0.9995:
        return Scale(1e-3, " ms")
    if size < 3600:
        return Scale(1.0, " s")
    if size < 3 * 3600:
        return Scale(60.0, " min")
    return Scale(3600.0, " h") if size < 48 * 3600 else Scale(86400.0, " d")


def bytes_scale(size_bytes: float) -> Scale:
    """Binary units, as allocators and nvidia-smi count."""
    for divisor, suffix in ((TIB, " TiB"), (GIB, " GiB"), (MIB, " MiB"), (KIB, " KiB")):
        if abs(size_bytes) >= divisor:
            return Scale(divisor, suffix, digits=4 if abs(size_bytes) >= 100 * divisor else 3)
    return Scale(1.0, " B")


def count_scale(count: float) -> Scale:
    """K, M, B, T as the field writes parameters and tokens; below 10,000 the number itself."""
    for divisor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= (divisor if divisor > 1e3 else 1e4):
            return Scale(divisor, suffix)
    return Scale(1.0, "")


def scale_for(unit: str, value: float) -> Scale:
    """The scale for a value of a named unit: one of `ir.plan.Estimate.unit`, or any other, which is written out as it is."""
    if unit == "s":
        return seconds_scale(value)
    if unit == "bytes":
        return bytes_scale(value)
    if unit == "fraction":
        return Scale(0.01, "%")
    if unit == "":
        return count_scale(value)
    scale = count_scale(value)
    name = {"tokens/s": "tok/s", "tokens/s/gpu": "tok/s/GPU"}.get(unit, unit)
    return Scale(scale.divisor, f"{scale.suffix} {name}")


def number_text(value: float, digits: int = 3) -> str:
    """`value` with about `digits` significant figures, thousands separated, no trailing zeros, E notation only below 1e-4."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - magnitude)
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scaled_text(value: float, scale: Scale) -> str:
    """`value` written in `scale`, unit included."""
    return number_text(value / scale.divisor, scale.digits) + scale.suffix


def seconds_text(seconds: float) -> str:
    """A duration: `12.5 ms`, `538 s`, `16.9 h`."""
    return scaled_text(seconds, seconds_scale(seconds))


def bytes_text(size_bytes: float) -> str:
    """A size: `71 GiB`, `1.31 TiB`."""
    return scaled_text(size_bytes, bytes_scale(size_bytes))


def count_text(count: float) -> str:
    """A count: `671B`, `52.9M`, `8,192`."""
    return scaled_text(count, count_scale(count))


def quantity_text(value: float, unit: str) -> str:
    """A value of a named unit, see `scale_for`."""
    return scaled_text(value, scale_for(unit, value))


def estimate_text(low: float, mid: float, high: float, unit: str) -> str:
    """`538 s (402–811)`: the middle with the interval in the unit of the upper end; the middle alone where it is exact."""
    if low == mid == high:
        return quantity_text(mid, unit)
    scale = scale_for(unit, high)
    return f"{scaled_text(mid, scale)} ({interval_text(low, high, scale)})"


def interval_text(low: float, high: float, scale: Scale) -> str:
    """`402–811`, both in `scale`, without the unit; `-3 to -1` where a dash would look like a sign."""
    between = EN_DASH if low >= 0 else " to "
    return f"{number_text(low / scale.divisor)}{between}{number_text(high / scale.divisor)}"


def change_text(before: float, after: float) -> str:
    """The relative change: `+12%`, `-3.4%`, `x2.1` from a doubling on, `` where nothing can be said."""
    if before == after or before == 0 or not (math.isfinite(before) and math.isfinite(after)):
        return ""
    ratio = after / before
    if ratio >= 2:
        return f"x{number_text(ratio, 2)}"
    return f"{'+' if ratio > 1 else '-'}{number_text(abs(ratio - 1) * 100, 2)}%"


def plural(count: int, noun: str) -> str:
    """`1 task`, `1,024 GPUs`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
