"""Demonstrations for supervised fine-tuning, from JSONL: `{"prompt": ..., "response": ...}`.

The response is plain text; its tokens end with the tokenizer's end token, which the model must learn to write.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from miles_plan.data.batch import Array, SampleBatch
from miles_plan.data.fields import TooLong, encode_prompt, index_rows, row_problems
from miles_plan.data.jsonl import JsonlFile, Row, index_jsonl
from miles_plan.data.order import rows_at
from miles_plan.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One row: position in the run's stream, row in the file, tokens of the prompt and of the response with its end token."""

    position: int
    row: int
    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DemonstrationSet:
    """A checked file of demonstrations with the order of a run. kept: int64, the rows short enough."""

    file: JsonlFile
    tokenizer: Tokenizer
    kept: Array
    seed: int
    shuffle: bool

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.kept)

    @property
    def dropped(self) -> int:
        """Rows left out because they are longer than allowed."""
        return len(self.file) - len(self.kept)

    def batch(self, step: int, rows_per_step: int) -> list[Demonstration]:
        """The rows of one step (from 0), a pure function of (file, seed, step)."""
        start = step * rows_per_step
        rows = self.kept[rows_at(start, rows_per_step, rows=len(self.kept), seed=self.seed, shuffle=self.shuffle)]
        found = zip(rows, self.file.read(rows), strict=True)
        return [self._demonstration(start + offset, int(row), content) for offset, (row, content) in enumerate(found)]

    def _demonstration(self, position: int, row: int, content: Row) -> Demonstration:
        prompt, response = _encode(content, self.tokenizer)
        return Demonstration(position=position, row=row, prompt_tokens=prompt, response_tokens=response)


def check_demonstrations(path: str | os.PathLike[str]) -> JsonlFile:
    """Parse and check a file of demonstrations without a tokenizer. DataError lists every bad line up to a limit."""
    return index_jsonl(path, lambda row: row_problems(row, "response"))


def open_demonstrations(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    seed: int,
    shuffle: bool = True,
    max_tokens: int | None = None,
    on_too_long: TooLong = "drop",
) -> DemonstrationSet:
    """Index a file, tokenize each row once, and leave out (or, with `fail`, report) rows of more than `max_tokens` in all.

    DataError when a line is bad, a text cannot be tokenized, or nothing is left.
    """
    file, kept = index_rows(
        path,
        required="response",
        measure=lambda row: sum(map(len, _encode(row, tokenizer))),
        max_tokens=max_tokens,
        on_too_long=on_too_long,
    )
    return DemonstrationSet(file=file, tokenizer=tokenizer, kept=kept, seed=seed, shuffle=shuffle)


def demonstration_batch(rows: Sequence[Demonstration]) -> SampleBatch:
    """Demonstrations as samples: sample_id and prompt_id are positions, rollout log-probs zero, weight version 0."""
    tokens = [token for row in rows for token in (*row.prompt_tokens, *row.response_tokens)]
    num_response_tokens = sum(len(row.response_tokens) for row in rows)
    positions = np.array([row.position for row in rows], dtype=np.int64)
    return SampleBatch(
        sample_id=positions,
        prompt_id=positions.copy(),
        tokens=np.array(tokens, dtype=np.int32),
        prompt_length=np.array([len(row.prompt_tokens) for row in rows], dtype=np.int32),
        length=np.array([len(row.prompt_tokens) + len(row.response_tokens) for row in rows], dtype=np.int32),
        stopped=np.ones(len(rows), dtype=np.bool_),
        rollout_log_probs=np.zeros(num_response_tokens, dtype=np.float32),
        weight_version=np.zeros(num_response_tokens, dtype=np.int32),
    )


def _encode(row: Row, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    prompt = encode_prompt(row, tokenizer).tokens
    try:
        return prompt, (*tokenizer.encode(row["response"]), tokenizer.eos_token_id)
    except ValueError as error:
        raise ValueError(f"in the response: {error}") from error
