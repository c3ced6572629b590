"""Arguments and options that several commands share, so that they look the same everywhere."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
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
ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "--profile", metavar="FILE", help="Price with this hardware profile (`miles-plan calibrate`): `cluster.profile`."
    ),
]


def profile_override(profile: Path | None) -> list[str]:
    """What `--set` would say for `--profile`."""
    return [] if profile is None else [f"cluster.profile={json.dumps(str(profile), ensure_ascii=False)}"]
