"""The packaged models: names, aliases and one look-up."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

from miles_plan.catalog.architecture import ModelArchitecture, architecture_from_dict


def model_names() -> tuple[str, ...]:
    """Canonical names, sorted."""
    return tuple(_rows())


def model_aliases() -> Mapping[str, str]:
    """Every other accepted name with its canonical one."""
    return {alias: name for name, row in _rows().items() for alias in row["aliases"]}


def find_model(name: str) -> ModelArchitecture:
    """The architecture called `name`, a canonical name or an alias, in any case and with or without its owner.

    Raises:
        ValueError: no such model; the message names the nearest ones.
    """
    wanted = name.lower().rsplit("/", 1)[-1]
    row = _rows().get(wanted)
    if row is None:
        canonical = model_aliases().get(wanted)
        if canonical is None:
            raise ValueError(f"no model called {name!r}{_suggestion(wanted)}")
        return find_model(canonical)
    return _architecture(wanted)


@lru_cache(maxsize=256)
def _architecture(name: str) -> ModelArchitecture:
    sizes = {key: value for key, value in _rows()[name].items() if key != "aliases"}
    return architecture_from_dict({"name": name, **sizes})


def _suggestion(wanted: str) -> str:
    known = [*_rows(), *model_aliases()]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


@lru_cache(maxsize=1)
def _rows() -> dict[str, dict[str, Any]]:
    text = files("miles_plan.catalog").joinpath("models.json").read_text(encoding="utf-8")
    models: dict[str, dict[str, Any]] = json.loads(text)["models"]
    return models
