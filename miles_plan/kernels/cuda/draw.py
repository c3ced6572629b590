"""One random draw of an invariance check: its dice, its tensors, and what it compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch

Choice = TypeVar("Choice")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Number of elements whose bits differ, int64 on the tensors' device; NaNs with equal bits are equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return torch.full((), max(a.numel(), b.numel(), 1), device=a.device)
    kind = _INTEGERS[a.element_size()]
    return (a.contiguous().view(kind) != b.contiguous().view(kind)).sum()


class Draw:
    """A seeded source of shapes and values, and the comparisons made with them.

    Shapes come from a generator on the host, values from one on the device, so a seed gives the same shapes everywhere. Every
    third seed has `heavy` values.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.heavy = seed % 3 == 2
        self._dice = torch.Generator().manual_seed(seed)
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._labels: list[str] = []
        self._counts: list[torch.Tensor] = []

    def integer(self, low: int, high: int) -> int:
        """A number in [low, high], small ones as likely as large ones."""
        span = math.log(high + 1) - math.log(max(low, 1))
        value = max(low, 1) * math.exp(float(torch.rand((), generator=self._dice)) * span)
        return min(high, max(low, int(value) - (1 if low == 0 else 0)))

    def pick(self, values: Sequence[Choice]) -> Choice:
        """One of the values."""
        return values[int(torch.randint(len(values), (), generator=self._dice))]

    def span(self, rows: int) -> slice:
        """Some consecutive rows, often few."""
        count = self.integer(1, rows)
        first = int(torch.randint(rows - count + 1, (), generator=self._dice))
        return slice(first, first + count)

    def spans(self, rows: int, count: int = 6) -> list[slice]:
        """Several spans: as many positions and sets of neighbours."""
        return [self.span(rows) for _ in range(count)]

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        """Random normal values."""
        return (torch.randn(shape, device=self.device, generator=self._generator) * scale).to(dtype)

    def values(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        """What a model might hold: normal values or, in a heavy draw, columns of log-normal size among which a few are a thousand
        times larger and a few are zero, and some subnormal elements. Their root mean square is about `scale` all the same."""
        if not self.heavy:
            return self.normal(*shape, dtype=dtype, scale=scale)
        width = shape[-1]
        size = torch.exp(1.5 * self.normal(width, dtype=torch.float32))
        kind = self._uniform(width)
        size = torch.where(kind < 0.004, size * 1e3, size) * (kind < 0.97)
        size = size / size.square().mean().sqrt().clamp(min=1e-6)
        plain = self.normal(*shape, dtype=torch.float32) * size * scale
        return torch.where(self._uniform(*shape) < 0.002, torch.finfo(dtype).tiny / 3, plain).to(dtype)

    def _uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, device=self.device, generator=self._generator)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Random integers in [low, high)."""
        return torch.randint(low, high, shape, device=self.device, generator=self._generator).to(dtype)

    def permutation(self, count: int) -> torch.Tensor:
        """Numbers 0 to count in random order, int64."""
        return torch.randperm(count, device=self.device, generator=self._generator)

    def table(self, *values: int) -> torch.Tensor:
        """The given numbers, int32 on the device."""
        return torch.tensor(values, device=self.device, dtype=torch.int32)

    def compare(self, a: torch.Tensor, b: torch.Tensor, label: str) -> None:
        """Note whether two results that must agree do; `label` is the shape and position that shows it if they do not."""
        self._labels.append(label)
        self._counts.append(differing(a, b))

    @property
    def comparisons(self) -> int:
        """How many (shape, position, neighbours) were compared."""
        return len(self._counts)

    def outcome(self) -> tuple[int, str | None]:
        """Differing elements in all comparisons, and the label of the first that differed. Waits for the device."""
        counts = torch.stack(self._counts).tolist() if self._counts else []
        first = next((label for label, count in zip(self._labels, counts, strict=True) if count), None)
        return sum(counts), first
