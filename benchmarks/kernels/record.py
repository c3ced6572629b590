"""The result of one shape, and the checks every op's measurement shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .shapes import Shape

OURS = "ours"


@dataclass
class Record:
    """What one shape gave. Times are device microseconds a call, by `timing.time_side_by_side`."""

    shape: Shape
    us: dict[str, float] = field(default_factory=dict)
    same_bits: bool | None = None  # the op's rows alone equal its rows in the batch (None: not applicable)
    error: float | None = None  # root mean square of the difference from float64 over that of float64
    baseline_error: float | None = None
    tuned: bool | None = None  # whether a product's tile came from the table, and not from the tuner's prediction
    moved_bytes: int = 0  # what must cross the memory bus, for ops bound by it
    flop: float = 0.0
    failure: str = ""

    @property
    def baseline_us(self) -> float | None:
        """The faster baseline."""
        return min((us for name, us in self.us.items() if name != OURS), default=None)

    @property
    def ratio(self) -> float | None:
        """Baseline's time over ours: above 1 is faster than the baseline."""
        baseline = self.baseline_us
        return None if baseline is None or OURS not in self.us else baseline / self.us[OURS]

    @property
    def gb_per_s(self) -> float | None:
        """Memory rate of ours."""
        return self.moved_bytes / self.us[OURS] / 1e3 if self.moved_bytes and OURS in self.us else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; rounded to what the clock can tell."""
        out: dict[str, Any] = {"shape": self.shape.to_dict(), "us": {k: round(v, 2) for k, v in self.us.items()}}
        if self.ratio is not None:
            out["ratio"] = round(self.ratio, 3)
        if self.gb_per_s is not None:
            out["gb_per_s"] = round(self.gb_per_s)
        if self.flop and OURS in self.us:
            out["tflop_per_s"] = round(self.flop / self.us[OURS] / 1e6, 1)
        for name in ("same_bits", "tuned", "error", "baseline_error", "failure"):
            value = getattr(self, name)
            if value not in (None, ""):
                out[name] = float(f"{value:.3g}") if isinstance(value, float) else value
        return out


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference over that of the exact float64 values."""
    return float((result.double() - exact).norm() / exact.norm().clamp(min=1e-300))
