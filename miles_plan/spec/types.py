"""The kinds of value a spec field can have: bounded numbers, words, paths, `auto`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import Discriminator, Field, Tag

W = TypeVar("W")
V = TypeVar("V")

WORD_TAG = "<word>"
VALUE_TAG = "<value>"


@dataclass(frozen=True, slots=True)
class Form:
    """The form a text field must have: error messages say `must be <words>`, and suggest one of the values that are `known`."""

    words: str
    known: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PathMark:
    """The field names a file or directory of the user; relative to the spec file that names it."""

    kind: Literal["file", "directory", "any"] = "any"


def _branch(value: object) -> str:
    return WORD_TAG if isinstance(value, str) else VALUE_TAG


# Text goes to the first form, everything else to the second, so that an error speaks of the form that was meant.
WordOr = Annotated[Annotated[W, Tag(WORD_TAG)] | Annotated[V, Tag(VALUE_TAG)], Discriminator(_branch)]
AutoOr = WordOr[Literal["auto"], V]

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
Size = Annotated[int, Field(ge=1, le=1_048_576)]  # a parallel size or a number of devices
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
LearningRateOrZero = Annotated[float, Field(ge=0, le=10)]
Coefficient = Annotated[float, Field(ge=0, le=1_000)]
Gib = Annotated[float, Field(gt=0, le=1_048_576)]
Gbps = Annotated[float, Field(gt=0, le=1_048_576)]
Seconds = Annotated[float, Field(gt=0, le=604_800)]

Name = Annotated[
    str,
    Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$"),
    Form("1 to 64 lower-case letters, digits, `.`, `_` or `-`, starting with a letter or digit"),
]
CatalogName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/ -]{0,127}$"), Form("a catalog name: letters, digits, `.`, `_`, `-`")
]
_PATH_PATTERN = r"^[^\x00-\x1f\x7f]{1,4096}$"
PathText = Annotated[str, Field(pattern=_PATH_PATTERN), PathMark(), Form("a path")]
FilePath = Annotated[str, Field(pattern=_PATH_PATTERN), PathMark("file"), Form("a path of a file")]
DirectoryPath = Annotated[str, Field(pattern=_PATH_PATTERN), PathMark("directory"), Form("a path of a directory")]

BUILT_IN_REWARDS = ("math", "exact_match")
RewardName = Annotated[
    str,
    Field(
        pattern=r"^([a-z][a-z0-9_]*|[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*)$", max_length=256
    ),
    Form("the name of a built-in, or an entry point `package.module:function`", known=BUILT_IN_REWARDS),
]
