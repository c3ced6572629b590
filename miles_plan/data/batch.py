"""Samples in columns: what flows from rollout to reward to trainer, as flat NumPy arrays that Ray moves without copying.

N samples, T tokens in all (prompts and responses), R response tokens. Sequence i occupies `tokens[start[i] : start[i] +
length[i]]`, its prompt first. Per-response-token columns are flat too, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SampleBatch:
    """Prompts with their responses, one row a sample.

    sample_id: int64 [N], unique within a run; prompt_id: int64 [N], equal for the samples of one prompt;
    tokens: int32 [T]; prompt_length, length: int32 [N] (length counts prompt and response);
    stopped: bool [N], True where a stop token ended the response and not the length limit;
    rollout_log_probs: float32 [R], of each response token under the policy that sampled it (zeros for SFT data);
    weight_version: int32 [R], the weights that sampled each response token;
    routing: uint8 or uint16 [T, moe_layers, topk], the experts each token was sent to, or None for dense models. The last
    token of a sequence is never fed to the model: its rows are zero and are not compared;
    columns: further arrays by name, each of length N or R (`reward`, `old_log_probs`, `reference_log_probs`, `advantage`,
    `importance_weight`, ...).
    """

    sample_id: Array
    prompt_id: Array
    tokens: Array
    prompt_length: Array
    length: Array
    stopped: Array
    rollout_log_probs: Array
    weight_version: Array
    routing: Array | None = None
    columns: Mapping[str, Array] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.length)

    @property
    def num_tokens(self) -> int:
        """T, prompts and responses."""
        return len(self.tokens)

    @property
    def start(self) -> Array:
        """Offset of each sequence in `tokens`, int64 [N]."""
        return np.cumsum(self.length, dtype=np.int64) - self.length

    @property
    def response_length(self) -> Array:
        """Response tokens of each sample, int32 [N]."""
        return np.asarray(self.length - self.prompt_length)

    @property
    def response_start(self) -> Array:
        """Offset of each response in the flat per-response-token arrays, int64 [N]."""
        return np.cumsum(self.response_length, dtype=np.int64) - self.response_length

    def sequence(self, index: int) -> Array:
        """All tokens of one sample."""
        start = int(self.start[index])
        return self.tokens[start : start + int(self.length[index])]

    def response(self, index: int) -> Array:
        """The response tokens of one sample."""
        return self.sequence(index)[int(self.prompt_length[index]) :]

    def with_columns(self, **columns: Array) -> SampleBatch:
        """The same samples with columns added or replaced. ValueError for a length that is neither N nor R."""
        for name, values in columns.items():
            if len(values) not in (self.num_samples, len(self.rollout_log_probs)):
                raise ValueError(
                    f"column '{name}' has {len(values)} rows; expected one per sample ({self.num_samples}) "
                    f"or per response token ({len(self.rollout_log_probs)})"
                )
        return replace(self, columns={**self.columns, **columns})

    def select(self, index: Sequence[int] | Array) -> SampleBatch:
        """The samples at `index`, in that order, with every array cut alike."""
        rows = np.asarray(index, dtype=np.int64)
        token_rows = ragged_rows(self.start[rows], self.length[rows])
        response_rows = ragged_rows(self.response_start[rows], self.response_length[rows])
        columns = {
            name: values[rows] if len(values) == self.num_samples else values[response_rows]
            for name, values in self.columns.items()
        }
        return SampleBatch(
            sample_id=self.sample_id[rows],
            prompt_id=self.prompt_id[rows],
            tokens=self.tokens[token_rows],
            prompt_length=self.prompt_length[rows],
            length=self.length[rows],
            stopped=self.stopped[rows],
            rollout_log_probs=self.rollout_log_probs[response_rows],
            weight_version=self.weight_version[response_rows],
            routing=None if self.routing is None else self.routing[token_rows],
            columns=columns,
        )

    def problems(self) -> list[str]:
        """What does not fit together: lengths, ranges, missing routing rows. Empty when the batch is sound."""
        n, found = self.num_samples, []
        for name in ("sample_id", "prompt_id", "prompt_length", "stopped"):
            if len(getattr(self, name)) != n:
                found.append(f"{name} has {len(getattr(self, name))} rows, expected {n}")
        if found:
            return found
        if n and (self.prompt_length < 1).any():
            found.append("a sample has an empty prompt")
        if n and (self.response_length < 0).any():
            found.append("a sample is shorter than its prompt")
        if int(self.length.sum()) != self.num_tokens:
            found.append(f"lengths add up to {int(self.length.sum())} tokens, the batch holds {self.num_tokens}")
        num_response_tokens = int(self.response_length.sum())
        for name in ("rollout_log_probs", "weight_version"):
            if len(getattr(self, name)) != num_response_tokens:
                found.append(f"{name} has {len(getattr(self, name))} rows, expected {num_response_tokens}")
        if self.routing is not None and len(self.routing) != self.num_tokens:
            found.append(f"routing has {len(self.routing)} rows, expected {self.num_tokens}")
        if len(np.unique(self.sample_id)) != n:
            found.append("sample ids repeat")
        return found


def concatenate(batches: Iterable[SampleBatch]) -> SampleBatch:
    """One batch after the other. ValueError when none is given or when columns or routing differ between them."""
    parts = list(batches)
    if not parts:
        raise ValueError("nothing to concatenate")
    names = set(parts[0].columns)
    if any(set(part.columns) != names for part in parts):
        raise ValueError("batches carry different columns")
    if len({part.routing is None for part in parts}) > 1:
        raise ValueError("some batches carry routing and some do not")

    def join(name: str) -> Array:
        return np.concatenate([getattr(part, name) for part in parts])

    return SampleBatch(
        sample_id=join("sample_id"),
        prompt_id=join("prompt_id"),
        tokens=join("tokens"),
        prompt_length=join("prompt_length"),
        length=join("length"),
        stopped=join("stopped"),
        rollout_log_probs=join("rollout_log_probs"),
        weight_version=join("weight_version"),
        routing=None if parts[0].routing is None else join("routing"),
        columns={name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
    )


def ragged_rows(starts: Array, lengths: Array) -> Array:
    """Flat indices of the ranges `starts[i] : starts[i] + lengths[i]`, one after the other, int64."""
    total = int(np.sum(lengths))
    if not total:
        return np.zeros(0, dtype=np.int64)
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.arange(total, dtype=np.int64) + np.repeat(np.asarray(starts) - (ends - lengths), lengths)
