"""Text to tokens and back, behind one small protocol: bytes, characters of a stated alphabet, or a local `tokenizer.json`.

Nothing is fetched from a network. `encode` adds no special token: what stands before a plain prompt is `prefix_token_ids`,
what ends a response is `eos_token_id`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from miles_plan.data.chat import ChatTemplate
from miles_plan.data.problem import DataError, DataProblem

UNKNOWN = "\ufffd"  # decoded in place of an id that has no text, so that it can never complete a right answer


@runtime_checkable
class Tokenizer(Protocol):
    """What a run needs of a tokenizer. vocab_size counts ids, special ones included; a model may have more rows."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eos_token_id(self) -> int:
        """Ends a response."""
        ...

    @property
    def pad_token_id(self) -> int:
        """Fills rectangles; never part of a sample."""
        ...

    @property
    def prefix_token_ids(self) -> tuple[int, ...]:
        """What stands before a plain prompt (BOS), often nothing; chat templates write it themselves."""
        ...

    @property
    def chat_template(self) -> ChatTemplate | None:
        """How messages become a prompt; None when the tokenizer has no template."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. ValueError for a character that has none."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens left out; U+FFFD for each id without a text."""
        ...


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """The 256 bytes of UTF-8, then end (256) and padding (257)."""

    vocab_size: int = field(default=258, init=False)
    eos_token_id: int = field(default=256, init=False)
    pad_token_id: int = field(default=257, init=False)
    prefix_token_ids: tuple[int, ...] = field(default=(), init=False)
    chat_template: ChatTemplate | None = None

    def encode(self, text: str) -> list[int]:
        """The bytes of the text. ValueError for a lone surrogate."""
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the bytes, U+FFFD where they are no UTF-8 or an id is none of ours."""
        parts = (bytes([token]) if token < 256 else UNKNOWN.encode() for token in map(int, tokens) if token not in (256, 257))
        return b"".join(parts).decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class CharacterTokenizer:
    """One token a character of `alphabet`, in its order, then end and padding. ValueError for a repeated character."""

    alphabet: str
    prefix_token_ids: tuple[int, ...] = field(default=(), init=False)
    chat_template: ChatTemplate | None = None

    def __post_init__(self) -> None:
        if not self.alphabet:
            raise ValueError("the alphabet is empty")
        if repeated := sorted({character for character in self.alphabet if self.alphabet.count(character) > 1}):
            raise ValueError(f"the alphabet holds {repeated[0]!r} more than once")

    @property
    def vocab_size(self) -> int:
        """The characters and the two special tokens."""
        return len(self.alphabet) + 2

    @property
    def eos_token_id(self) -> int:
        """The id after the last character."""
        return len(self.alphabet)

    @property
    def pad_token_id(self) -> int:
        """The last id."""
        return len(self.alphabet) + 1

    def encode(self, text: str) -> list[int]:
        """Each character's place in the alphabet. ValueError names the first that is not in it."""
        tokens = [self.alphabet.find(character) for character in text]
        if -1 in tokens:
            position = tokens.index(-1)
            raise ValueError(f"character {position + 1}, {text[position]!r}, is not in the alphabet {self.alphabet!r}")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The characters, end and padding left out, U+FFFD for an id beyond them."""
        special = (self.eos_token_id, self.pad_token_id)
        return "".join(self._character(token) for token in map(int, tokens) if token not in special)

    def _character(self, token: int) -> str:
        return self.alphabet[token] if 0 <= token < len(self.alphabet) else UNKNOWN


@dataclass(frozen=True, slots=True, eq=False)
class HuggingFaceTokenizer:
    """A `tokenizer.json` read by the `tokenizers` library, with the end token and chat template its folder names."""

    tokenizer: Any  # tokenizers.Tokenizer, imported only when one is opened
    vocab_size: int
    eos_token_id: int
    pad_token_id: int
    prefix_token_ids: tuple[int, ...]
    chat_template: ChatTemplate | None

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS and EOS; special tokens that a chat template wrote into the text are recognised."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text without special tokens; ids beyond the vocabulary, which the library would skip, become U+FFFD."""
        pieces, run = list[str](), list[int]()
        for token in map(int, tokens):
            if self.tokenizer.id_to_token(token) is None:
                pieces += [self.tokenizer.decode(run, skip_special_tokens=True), UNKNOWN]
                run = []
            else:
                run.append(token)
        return "".join([*pieces, self.tokenizer.decode(run, skip_special_tokens=True)])


def tokenizer_from(source: str | os.PathLike[str], *, alphabet: str | None = None, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer that `source` names: `byte`, `characters` (with its alphabet), a `tokenizer.json`, or the folder of one.

    eos_token overrides what a Hugging Face folder says. ValueError for a bad alphabet or name, DataError for a bad file.
    """
    if source == "byte":
        return ByteTokenizer()
    if source == "characters":
        if alphabet is None:
            raise ValueError("a character tokenizer needs its alphabet")
        return CharacterTokenizer(alphabet)
    path = Path(source)
    if not path.exists() and path.name == str(source) and (near := get_close_matches(path.name, ["byte", "characters"], n=1)):
        raise ValueError(f"there is no tokenizer '{source}' and no such file; did you mean '{near[0]}'?")
    return _open_hugging_face(path / "tokenizer.json" if path.is_dir() else path, eos_token)


def _open_hugging_face(path: Path, eos_token: str | None) -> HuggingFaceTokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError([DataProblem(str(path), 0, 0, f"cannot be read: {error.strerror or error}")]) from error
    except Exception as error:  # the library raises plain Exception for a file it cannot parse
        raise DataError([DataProblem(str(path), 0, 0, f"is no tokenizer.json: {error}")]) from error
    settings = _settings(path.parent)
    special = {
        name: text for name in ("bos_token", "eos_token", "pad_token", "unk_token") if (text := _token_text(settings, name))
    }
    if eos_token is not None:
        special["eos_token"] = eos_token
    eos = _token_id(tokenizer, path, special.get("eos_token"))
    pad = special.get("pad_token")
    return HuggingFaceTokenizer(
        tokenizer=tokenizer,
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        eos_token_id=eos,
        pad_token_id=eos if pad is None else _token_id(tokenizer, path, pad),
        prefix_token_ids=_prefix(tokenizer),
        chat_template=_chat_template(path.parent, settings, special),
    )


def _token_id(tokenizer: Any, path: Path, token: str | None) -> int:
    if token is None:
        raise DataError(
            [DataProblem(str(path), 0, 0, "no end token known: put tokenizer_config.json beside it or name eos_token")]
        )
    found = tokenizer.token_to_id(token)
    if found is None:
        near = get_close_matches(token, tokenizer.get_vocab(with_added_tokens=True), n=1)
        raise DataError(
            [DataProblem(str(path), 0, 0, f"has no token {token!r}" + (f"; did you mean {near[0]!r}?" if near else ""))]
        )
    return int(found)


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """What the post-processor puts before a text: the special tokens ahead of the first ordinary one."""
    encoding = tokenizer.encode("0", add_special_tokens=True)
    ordinary = encoding.special_tokens_mask.index(0) if 0 in encoding.special_tokens_mask else 0
    return tuple(encoding.ids[:ordinary])


def _settings(folder: Path) -> Mapping[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError([DataProblem(str(path), 0, 0, f"cannot be read: {error}")]) from error
    return settings if isinstance(settings, dict) else {}


def _token_text(settings: Mapping[str, Any], name: str) -> str | None:
    """A special token's text; the file holds it plain or inside an AddedToken object."""
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, settings: Mapping[str, Any], special: Mapping[str, str]) -> ChatTemplate | None:
    """The template of `chat_template.jinja`, else of tokenizer_config.json (a string, or the one named `default`)."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return ChatTemplate(path.read_text(encoding="utf-8"), special)
    return next((ChatTemplate(source, special) for source in _templates(settings.get("chat_template"))), None)


def _templates(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        named = {
            entry["name"]: entry["template"]
            for entry in value
            if isinstance(entry, dict) and {"name", "template"} <= set(entry)
        }
        if isinstance(named.get("default"), str):
            yield named["default"]
