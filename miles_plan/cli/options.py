"""Arguments and options that several commands share, so that they look the same everywhere."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class OutputFormat(StrEnum):
    """How findings are shown."""

    FULL = "full"
    CONCISE = "concise"
    JSON = "json"
    SARIF = "sarif"
    GITHUB = "github"


SpecFile = Annotated[str, typer.Argument(metavar="SPEC", help="The job spec, a YAML file.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override one field, e.g. rollout.temperature=0.7. May be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for tools instead of text.")]
FindingsFormat = Annotated[OutputFormat, typer.Option("--format", help="How findings are shown.")]
