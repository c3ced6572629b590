"""The order in which a run meets the rows of its data: shuffled anew each epoch, a pure function of (seed, epoch).

A stream position p (0, 1, 2, ... over the whole run) is place p % rows of epoch p // rows. So a run that resumes needs no state
but how many rows it has used. Keys come from SplitMix64 and not from numpy.random, whose streams may change between versions
(NEP 19): an order must outlive an upgrade.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from miles_plan.data.batch import Array

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # constants: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014
_MASK = (1 << 64) - 1


def rows_at(start: int, count: int, *, rows: int, seed: int, shuffle: bool = True) -> Array:
    """Rows at the stream positions start ... start + count - 1, int64 [count]. ValueError for negative or empty input."""
    if rows < 1 or start < 0 or count < 0:
        raise ValueError(f"no rows at start={start}, count={count} of {rows} rows")
    positions = np.arange(start, start + count, dtype=np.int64)
    if not shuffle:
        return positions % rows
    epochs = positions // rows
    found = np.empty(count, dtype=np.int64)
    for epoch in range(start // rows, (start + count - 1) // rows + 1 if count else 0):
        here = epochs == epoch
        found[here] = epoch_order(rows, seed=seed, epoch=epoch)[positions[here] % rows]
    return found


@lru_cache(maxsize=4)
def epoch_order(rows: int, *, seed: int, epoch: int) -> Array:
    """A permutation of range(rows), int64 and read-only; equal arguments give equal permutations for ever."""
    stream = mix(mix(seed) + epoch)
    keys = _mix_all(np.arange(rows, dtype=np.uint64) * np.uint64(_GOLDEN_GAMMA) + np.uint64(stream))
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def mix(value: int) -> int:
    """SplitMix64's next output for a state: a 64-bit hash of an integer."""
    value = (value + _GOLDEN_GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_all(values: Array) -> Array:
    values = values + np.uint64(_GOLDEN_GAMMA)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
