"""`miles-plan models`: the catalog's models."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from miles_plan.cli.options import AsJson

Filter = Annotated[str, typer.Argument(metavar="[TEXT]", help="Only names that contain this.")]


def models(text: Filter = "", as_json: AsJson = False) -> None:
    """List the models that `model.name` accepts."""
    rows = [_row(name) for name in _names(text)]
    if as_json:
        sys.stdout.write(json.dumps({"schema": "miles-plan/models/1", "models": rows}, indent=2) + "\n")
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from miles_plan.cli.console import console

    table = Table(box=SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    for title in ("parameters", "active", "layers", "hidden", "experts", "vocabulary"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        experts = f"{row['experts_per_token']} of {row['experts']}" if row["experts"] else ""
        sizes = (_billions(row["params_total"]), _billions(row["params_active"]), row["layers"], row["hidden_size"])
        table.add_row(row["name"], *map(str, sizes), experts, f"{row['vocab_size']:,}")
    console().print(table)


def _names(text: str) -> list[str]:
    from miles_plan.catalog.models import model_names

    return [name for name in model_names() if text.lower() in name]


def _row(name: str) -> dict[str, Any]:
    from miles_plan.catalog.models import find_model

    model = find_model(name)
    return {
        "name": name,
        "params_total": model.params_total,
        "params_active": model.params_active,
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "experts": model.moe.experts if model.moe else 0,
        "experts_per_token": model.moe.topk if model.moe else 0,
        "mtp_layers": model.mtp_layers,
    }


def _billions(params: int) -> str:
    return f"{params / 1e9:,.1f}B" if params >= 1e9 else f"{params / 1e6:,.0f}M"
