"""How long responses get: a distribution from its maximum, mean and 99th percentile, or from a file of lengths."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_NORMAL = NormalDist()
_GRID = 1024


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """Lengths in tokens as a quantile table: `table[i]` is the quantile at probability (i + 0.5) / len(table)."""

    table: tuple[float, ...]

    @property
    def mean_tokens(self) -> float:
        """Mean length."""
        return float(np.mean(self.table))

    @property
    def max_tokens(self) -> float:
        """Longest length."""
        return self.table[-1]

    @property
    def mean_square(self) -> float:
        """Mean of the squared length, which attention costs."""
        return float(np.mean(np.square(self.table)))

    def quantile(self, probability: ArrayLike) -> Floats:
        """Length at a probability between 0 and 1."""
        at = np.asarray(probability, dtype=np.float64) * len(self.table) - 0.5
        return np.asarray(np.interp(at, np.arange(len(self.table)), self.table))

    def sample(self, count: int) -> Floats:
        """`count` representative lengths in ascending order: the medians of the order statistics."""
        return self.quantile((np.arange(count) + 0.6825) / (count + 0.365) if count > 1 else [0.5])

    def cut(self, cap: float) -> LengthDistribution:
        """The same with a limit: what would have run longer ends there."""
        return self if self.max_tokens <= cap else LengthDistribution(tuple(min(each, cap) for each in self.table))

    def share_at_cap(self) -> float:
        """Share of responses that end at the longest length."""
        table = np.asarray(self.table)
        return float(np.mean(table >= table[-1] * 0.9995))


def fit_lengths(max_tokens: float, mean_tokens: float, p99_tokens: float | None = None) -> LengthDistribution:
    """A lognormal cut off at `max_tokens` with the given mean and 99th percentile.

    What would have run longer ends at the cap, as in generation. Without `p99_tokens` the spread is that of reasoning
    workloads, sigma 0.8.

    Raises:
        ValueError: the figures contradict each other.
    """
    if not 0 < mean_tokens <= max_tokens:
        raise ValueError(f"mean {mean_tokens:g} must be above 0 and at most the max {max_tokens:g}")
    if p99_tokens is not None and not mean_tokens <= p99_tokens <= max_tokens:
        raise ValueError(f"p99 {p99_tokens:g} must lie between the mean {mean_tokens:g} and the max {max_tokens:g}")
    normal = np.array([_NORMAL.inv_cdf((at + 0.5) / _GRID) for at in range(_GRID)])
    if p99_tokens is None:
        return LengthDistribution(tuple(_with_mean(normal, 0.8, mean_tokens, max_tokens)))
    low, high = 1.0e-4, 4.0
    for _ in range(30):
        sigma = (low + high) / 2
        table = _with_mean(normal, sigma, mean_tokens, max_tokens)
        if np.interp(0.99 * _GRID - 0.5, np.arange(_GRID), table) < p99_tokens:
            low = sigma
        else:
            high = sigma
    return LengthDistribution(tuple(_with_mean(normal, (low + high) / 2, mean_tokens, max_tokens)))


def _with_mean(normal: Floats, sigma: float, mean: float, cap: float) -> Floats:
    """Quantiles of exp(mu + sigma z) cut at the cap, mu chosen for the mean."""
    low, high = np.log(mean) - 12.0, np.log(cap) + 12.0
    for _ in range(40):
        mu = (low + high) / 2
        if np.minimum(np.exp(mu + sigma * normal), cap).mean() < mean:
            low = mu
        else:
            high = mu
    return np.asarray(np.maximum(1.0, np.minimum(np.exp((low + high) / 2 + sigma * normal), cap)))


def fixed_length(tokens: float) -> LengthDistribution:
    """Every response equally long."""
    if tokens <= 0:
        raise ValueError(f"a length must be positive, got {tokens:g}")
    return LengthDistribution((float(tokens),) * 2)


def load_lengths(path: Path) -> LengthDistribution:
    """Read a histogram file: JSON `{"lengths": [...]}`, `{"edges": [...], "counts": [...]}`, or a number a line.

    Raises:
        ValueError: the file cannot be read, is in neither form, or holds no positive lengths.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            lengths, counts = _from_json(json.loads(text))
        else:
            lengths = np.array([float(line) for line in text.split()])
            counts = np.ones_like(lengths)
    except (OSError, KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: not a file of lengths ({error})") from error
    lengths, counts = lengths[counts > 0], counts[counts > 0]
    if lengths.ndim != 1 or lengths.size == 0 or not np.isfinite(lengths).all() or lengths.min() <= 0:
        raise ValueError(f"{path}: lengths must be positive and there must be some")
    return LengthDistribution(tuple(float(each) for each in _quantiles(lengths, counts)))


def _quantiles(lengths: Floats, counts: Floats) -> Floats:
    """The table of lengths that occur `counts` times each, its last entry the longest."""
    order = np.argsort(lengths)
    sizes, times = lengths[order], counts[order]
    middles = (np.cumsum(times) - 0.5 * times) / times.sum()
    table = np.interp((np.arange(_GRID) + 0.5) / _GRID, middles, sizes)
    table[-1] = sizes[-1]
    return np.asarray(table)


def _from_json(data: dict[str, list[float]]) -> tuple[Floats, Floats]:
    """Lengths, and how often each occurs."""
    if "lengths" in data:
        lengths = np.array(data["lengths"], dtype=np.float64)
        return lengths, np.ones_like(lengths)
    edges, counts = np.array(data["edges"], dtype=np.float64), np.array(data["counts"], dtype=np.float64)
    if edges.ndim != 1 or edges.shape[0] != counts.shape[0] + 1:
        raise ValueError(f"{edges.size} edges for {counts.size} counts")
    if not np.isfinite(counts).all() or counts.min(initial=0.0) < 0:
        raise ValueError("counts must not be negative")
    return (edges[1:] + edges[:-1]) / 2, counts
