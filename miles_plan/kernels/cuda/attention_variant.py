"""Ways to run the Hopper prefill kernel that give the same bits, and which of them is fastest on a GPU.

What is fastest depends on how long the rows are. `python -m benchmarks.kernels.tune_attention` measures it and writes a table; without
one the default runs.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

TABLE_VARIABLE = "MILES_PLAN_ATTENTION_TABLE"


@dataclass(frozen=True)
class PrefillVariant:
    """Switches of `attention_kernel`, none of which shows in a bit."""

    turns: bool = True  # the warp groups start their products one after the other, or as they come
    three_way: bool = False  # a row's maximum by comparing three integers at a time, or two floats
    skip: bool = False  # a warp whose rows keep their maxima does not multiply its values by one


VARIANTS = (
    PrefillVariant(),
    PrefillVariant(three_way=True),
    PrefillVariant(three_way=True, skip=True),
    PrefillVariant(turns=False, three_way=True),
)
Choices = Mapping[str, Mapping[int, PrefillVariant]]  # head sizes of keys and values -> tokens -> variant


def head_key(d: int, dv: int) -> str:
    """How a table names head sizes."""
    return f"{d}x{dv}"


def to_json(gpu: str, choices: Choices) -> str:
    """A table's text: one line for each pair of head sizes."""
    rows = {key: {str(n): [int(on) for on in astuple(row[n])] for n in sorted(row)} for key, row in choices.items()}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
    return f'{{"gpu": {json.dumps(gpu)}, "prefill": {{\n{lines}\n}}}}\n'


def from_json(text: str) -> Choices:
    """Read what `to_json` wrote."""
    rows = json.loads(text)["prefill"]
    return {key: {int(n): PrefillVariant(*map(bool, on)) for n, on in row.items()} for key, row in rows.items()}


@lru_cache(maxsize=8)
def _table(gpu: str) -> Choices:
    """The table of the GPU with this name: the user's file if the environment names one, else the shipped one, else empty."""
    if path := os.environ.get(TABLE_VARIABLE):
        return from_json(Path(path).read_text())
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    shipped = resources.files(__package__) / "tables" / f"{slug}.attention.json"
    return from_json(shipped.read_text()) if shipped.is_file() else {}


@lru_cache(maxsize=1024)
def prefill_variant(gpu: str, d: int, dv: int, tokens: int) -> PrefillVariant:
    """The variant for sequences of up to `tokens` queries: the one measured at the nearest length, or the default."""
    row = _table(gpu).get(head_key(d, dv), {})
    nearest = min(row, key=lambda n: abs(math.log(n / max(tokens, 1))), default=None)
    return PrefillVariant() if nearest is None else row[nearest]
