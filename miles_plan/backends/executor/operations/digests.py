"""Digests of what tasks make, taken where the data lie: equal work gives equal digests, whenever and wherever it is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np

from miles_plan.data.batch import Array, SampleBatch


def digest_of_arrays(arrays: Mapping[str, Array | None]) -> str:
    """SHA-256 over names, types, shapes and bytes; first 32 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        if array is None:
            continue
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def digest_of_batch(batch: SampleBatch) -> str:
    """Digest of every array of a batch, columns too."""
    fields = ("sample_id", "prompt_id", "tokens", "prompt_length", "length", "stopped", "rollout_log_probs", "weight_version")
    named: dict[str, Array | None] = {name: getattr(batch, name) for name in fields}
    named["routing"] = batch.routing
    named |= {f"column {name}": values for name, values in batch.columns.items()}
    return digest_of_arrays(named)


def digest_of_figures(figures: Mapping[str, float]) -> str:
    """Digest of numbers by name; floats by their exact value."""
    exact = {name: float(figures[name]).hex() for name in sorted(figures)}
    return hashlib.sha256(json.dumps(exact).encode()).hexdigest()[:32]
