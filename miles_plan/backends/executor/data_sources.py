"""The file behind a data source: the one the plan names, or one that a generator writes into the run's folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from miles_plan.data.arithmetic import ArithmeticOptions, write_task
from miles_plan.ir.plan import DataSource, RunOptions

Rows = Literal["prompts", "demonstrations", "evaluation"]
FILE_OF_ROWS = {"prompts": "prompts.jsonl", "demonstrations": "sft.jsonl", "evaluation": "eval.jsonl"}


def source_file(run: RunOptions, name: str, rows: Rows, data_folder: Path) -> Path:
    """The JSONL file of the source of that name. ValueError for a name or a generator there is not."""
    source = next((each for each in run.data if each.name == name), None)
    if source is None:
        raise ValueError(f"the plan has no data source '{name}'; it has {[each.name for each in run.data]}")
    if source.path is not None:
        return Path(source.path)
    if source.generator != "arithmetic":
        raise ValueError(f"data source '{name}': there is no generator '{source.generator}'")
    return _arithmetic(source, rows, data_folder)


def _arithmetic(source: DataSource, rows: Rows, data_folder: Path) -> Path:
    """The arithmetic task with these options; equal options give equal files, in a folder named after them."""
    digest = hashlib.sha256(json.dumps(dict(source.options), sort_keys=True).encode()).hexdigest()[:8]
    folder = data_folder / f"arithmetic-{digest}"
    if not (folder / FILE_OF_ROWS[rows]).exists():
        write_task(folder, ArithmeticOptions(**source.options))
    return folder / FILE_OF_ROWS[rows]
