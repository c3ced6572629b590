"""What the rows of a data file may hold: checks, encoding and length limit, shared by prompts and demonstrations."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np

from miles_plan.data.batch import Array
from miles_plan.data.chat import message_problems
from miles_plan.data.jsonl import FieldProblem, JsonlFile, Row, index_jsonl, json_type
from miles_plan.data.problem import DataError, DataProblem
from miles_plan.data.tokenizer import Tokenizer

TooLong = Literal["drop", "fail"]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt's text (after the chat template, if it was a list of messages) and its tokens."""

    text: str
    tokens: tuple[int, ...]


def index_rows(
    path: str | os.PathLike[str],
    *,
    required: str,
    measure: Callable[[Row], int],
    max_tokens: int | None,
    on_too_long: TooLong,
) -> tuple[JsonlFile, Array]:
    """Check every row and count its tokens with `measure`; return the file and the rows short enough, int64.

    DataError when a row is bad, when `measure` raises ValueError, when one is too long under `fail`, when none is left.
    """
    lengths = array("q")

    def check(row: Row) -> Iterator[FieldProblem]:
        if problems := list(row_problems(row, required)):
            yield from problems
            return
        try:
            lengths.append(measure(row))
        except ValueError as error:
            yield FieldProblem(_prompt_field(row), str(error))
            return
        if max_tokens is not None and on_too_long == "fail" and lengths[-1] > max_tokens:
            yield FieldProblem(_prompt_field(row), f"{lengths[-1]} tokens are too long, {max_tokens} are allowed")

    file = index_jsonl(path, check)
    kept = np.arange(len(file), dtype=np.int64)
    if max_tokens is not None:
        kept = kept[np.asarray(lengths) <= max_tokens]
    if not len(kept):
        message = f"every row is longer than the {max_tokens} tokens allowed; the shortest has {min(lengths)}"
        raise DataError([DataProblem(str(path), 0, 0, message)])
    return file, kept


def row_problems(row: Row, required: str) -> Iterator[FieldProblem]:
    """What is wrong with a row's types: one of `prompt` and `messages`, the `required` string, optional `id`, `metadata`."""
    if ("prompt" in row) == ("messages" in row):
        yield FieldProblem(
            None, "a row needs 'prompt', a string, or 'messages', a list" + ("; not both" if "prompt" in row else "")
        )
    if "prompt" in row and isinstance(row["prompt"], list):
        yield from (FieldProblem("prompt", message) for message in message_problems(row["prompt"]))
    elif "prompt" in row:
        yield from text_problems(row, "prompt")
        if row["prompt"] == "":
            yield FieldProblem("prompt", "the prompt is empty")
    if "messages" in row:
        yield from (FieldProblem("messages", message) for message in message_problems(row["messages"]))
    yield from text_problems(row, required)
    if "id" in row and (isinstance(row["id"], bool) or not isinstance(row["id"], str | int)):
        yield FieldProblem("id", f"'id' must be a string or a whole number, found {json_type(row['id'])}")
    if not isinstance(metadata := row.get("metadata", {}), dict):
        yield FieldProblem("metadata", f"'metadata' must be an object, found {json_type(metadata)}")
    else:
        yield from (
            FieldProblem(name, f"'{name}' also stands in 'metadata'") for name in _extras(row, required) if name in metadata
        )


def text_problems(row: Row, name: str) -> Iterator[FieldProblem]:
    """Why row[name] is no usable string: missing (with the nearest key there is), another type, half a surrogate pair."""
    if name not in row:
        near = get_close_matches(name, row, n=1)
        yield FieldProblem(None, f"'{name}' is missing" + (f"; '{near[0]}' may be meant" if near else ""))
    elif not isinstance(row[name], str):
        yield FieldProblem(name, f"'{name}' must be a string, found {json_type(row[name])}")
    elif any("\ud800" <= character <= "\udfff" for character in row[name]):
        yield FieldProblem(name, f"'{name}' holds half of a surrogate pair, which is no character")


def row_metadata(row: Row, required: str) -> Mapping[str, Any]:
    """The row's `metadata` with the fields we do not know under their own names, so that rewards see the whole row."""
    return {**row.get("metadata", {}), **{name: row[name] for name in _extras(row, required)}}


def encode_prompt(row: Row, tokenizer: Tokenizer) -> EncodedPrompt:
    """Text and tokens of a checked row's prompt. ValueError: no chat template, a character without a token, no token at all."""
    source = row["messages"] if "messages" in row else row["prompt"]
    if isinstance(source, str):
        prompt = EncodedPrompt(source, (*tokenizer.prefix_token_ids, *tokenizer.encode(source)))
    elif tokenizer.chat_template is None:
        raise ValueError("messages need a tokenizer with a chat template, and this one has none")
    else:
        text = tokenizer.chat_template.render(source)
        prompt = EncodedPrompt(text, tuple(tokenizer.encode(text)))
    if not prompt.tokens:
        raise ValueError("the prompt has no token")
    return prompt


def row_name(row: Row, number: int) -> str:
    """How reports call a row: its `id`, else its line number in the file."""
    return str(row.get("id", number + 1))


def _prompt_field(row: Row) -> str:
    return "messages" if "messages" in row else "prompt"


def _extras(row: Row, required: str) -> list[str]:
    return [name for name in row if name not in ("prompt", "messages", "id", "metadata", required)]
