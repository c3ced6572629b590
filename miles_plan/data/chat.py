"""Chat templates of Hugging Face tokenizers: a list of messages in, the prompt's text out.

The dialect is the one transformers documents ("Chat templates", huggingface.co/docs/transformers): Jinja in a sandbox with
`trim_blocks` and `lstrip_blocks`, plus `raise_exception` and `strftime_now`. A template is a program from the checkpoint, so it
runs in jinja2's immutable sandbox and sees nothing but the messages and the special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The template's source and the special tokens it may name (`bos_token`, `eos_token`, ...)."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Sequence[Message]) -> str:
        """The text up to and including the header of the assistant's next turn. ValueError when the template refuses."""
        try:
            return _compiled(self.source).render(messages=messages, add_generation_prompt=True, **self.special_tokens)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error


def message_problems(value: object) -> Iterator[str]:
    """What keeps a JSON value from being a list of chat messages (`role` and `content`, both strings)."""
    if not isinstance(value, list) or not value:
        yield "messages must be a list of at least one object with 'role' and 'content'"
        return
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            yield f"message {index} is not an object with 'role' and 'content'"
            continue
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                yield f"message {index} needs '{key}', a string"
        if extra := sorted(set(message) - {"role", "content"}):
            yield f"message {index} has the unknown key '{extra[0]}'"


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _no_clock
    environment.filters["tojson"] = _to_json
    return environment.from_string(source)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _no_clock(_format: str) -> NoReturn:
    # A prompt that holds the date is another prompt tomorrow, and a resumed run would not repeat itself.
    raise TemplateError("the template asks for the current date; give the date in a system message")


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
