"""`model:` which network is trained, and its tokenizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from miles_plan.spec.section import Section
from miles_plan.spec.types import CatalogName, DirectoryPath, FilePath, Form, PathText, WordOr

Characters = Annotated[str, Field(min_length=1, max_length=10_000), Form("a text of 1 to 10,000 different characters")]


class TokenizerSpec(Section):
    """A tokenizer that is given in the spec: exactly one of the two fields."""

    characters: Characters | None = None
    """Every character the task uses, each its own token, in order of their ids."""
    path: PathText | None = None
    """A `tokenizer.json`, or a directory that holds one."""


class ModelSpec(Section):
    """The network: exactly one of `name`, `hf_config`, `checkpoint` and `architecture`.

    All but `checkpoint` have no weights of their own: a run starts them from random ones.
    """

    name: CatalogName | None = None
    """A model of the catalog; `miles-plan models` lists them."""
    hf_config: FilePath | None = None
    """A Hugging Face `config.json`."""
    checkpoint: DirectoryPath | None = None
    """A local Hugging Face directory: `config.json` and weights in safetensors."""
    architecture: dict[str, JsonValue] | None = None
    """The keys of a Hugging Face config, written in the spec."""
    tokenizer: WordOr[Literal["auto", "byte"], TokenizerSpec] = "auto"
    """`auto` takes the tokenizer beside the checkpoint or config, `byte` one token per UTF-8 byte; or characters, or a path."""
