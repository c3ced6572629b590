"""Prompts for the rollout, from JSONL: `{"prompt": ..., "answer": ...}`, with optional `id` and `metadata`.

A prompt is a string, or a list of chat messages (`messages`, or a list under `prompt`) when the tokenizer has a chat template.
What a step sees is a pure function of (file, seed, step): a run that resumes needs its step number and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from miles_plan.data.batch import Array
from miles_plan.data.fields import TooLong, encode_prompt, index_rows, row_metadata, row_name, row_problems
from miles_plan.data.jsonl import JsonlFile, Row, index_jsonl
from miles_plan.data.order import rows_at
from miles_plan.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a step.

    position: its place in the run's stream, unique within the run (rows repeat from epoch to epoch, positions never do);
    row: its row in the file, from 0; name: its `id`, else its line number; text, tokens: after the chat template.
    """

    position: int
    row: int
    name: str
    text: str
    tokens: tuple[int, ...]
    answer: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PromptSet:
    """A checked prompt file with the order of a run. kept: int64, the rows short enough; dropped: how many were not."""

    file: JsonlFile
    tokenizer: Tokenizer
    kept: Array
    seed: int
    shuffle: bool

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self.kept)

    @property
    def dropped(self) -> int:
        """Prompts left out because they are longer than allowed."""
        return len(self.file) - len(self.kept)

    def batch(self, step: int, prompts_per_step: int) -> list[Prompt]:
        """The prompts of one step (from 0). A step may span epochs; it may then hold a row twice, at two positions."""
        return self.at(step * prompts_per_step, prompts_per_step)

    def at(self, start: int, count: int) -> list[Prompt]:
        """The prompts at stream positions start ... start + count - 1."""
        rows = self.kept[rows_at(start, count, rows=len(self.kept), seed=self.seed, shuffle=self.shuffle)]
        found = zip(rows, self.file.read(rows), strict=True)
        return [self._prompt(start + offset, int(row), content) for offset, (row, content) in enumerate(found)]

    def in_file_order(self, chunk: int = 1024) -> Iterator[Prompt]:
        """Every kept prompt once, as an evaluation wants them; position counts from 0."""
        for start in range(0, len(self.kept), chunk):
            rows = self.kept[start : start + chunk]
            for offset, (row, content) in enumerate(zip(rows, self.file.read(rows), strict=True)):
                yield self._prompt(start + offset, int(row), content)

    def _prompt(self, position: int, row: int, content: Row) -> Prompt:
        encoded = encode_prompt(content, self.tokenizer)
        return Prompt(
            position=position,
            row=row,
            name=row_name(content, row),
            text=encoded.text,
            tokens=encoded.tokens,
            answer=content["answer"],
            metadata=row_metadata(content, "answer"),
        )


def check_prompts(path: str | os.PathLike[str]) -> JsonlFile:
    """Parse and check a prompt file without a tokenizer. DataError lists every bad line up to a limit."""
    return index_jsonl(path, lambda row: row_problems(row, "answer"))


def open_prompts(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    seed: int,
    shuffle: bool = True,
    max_prompt_tokens: int | None = None,
    on_too_long: TooLong = "drop",
) -> PromptSet:
    """Index a prompt file, tokenize each prompt once, and leave out (or, with `fail`, report) those that are too long.

    DataError when a line is bad, a prompt cannot be tokenized, or nothing is left.
    """
    file, kept = index_rows(
        path,
        required="answer",
        measure=lambda row: len(encode_prompt(row, tokenizer).tokens),
        max_tokens=max_prompt_tokens,
        on_too_long=on_too_long,
    )
    return PromptSet(file=file, tokenizer=tokenizer, kept=kept, seed=seed, shuffle=shuffle)
