"""The file behind a data source: the one the plan names, or one that a generator writes into the run's folder."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from miles_plan.backends.executor.durable_files import write_durably
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
    digest = hashlib.sha256(json.dumps([rows, dict(source.options)], sort_keys=True).encode()).hexdigest()[:8]
    path = data_folder / f"arithmetic-{rows}-{digest}" / FILE_OF_ROWS[rows]
    if not path.exists():
        write_task(path.parent, arithmetic_options(source.options, rows))
        if rows == "prompts" and "num_prompts" in source.options:
            _keep_first(path, int(source.options["num_prompts"]))
    return path


def arithmetic_options(options: Mapping[str, Any], rows: Rows) -> ArithmeticOptions:
    """The generator's options from the spec's: `num_prompts` is the number of lines asked for, `max_operand` the largest operand."""
    renamed = {"max_operand": "largest"}
    given = {renamed.get(name, name): value for name, value in options.items() if name != "num_prompts"}
    if "operations" in given:
        given["operations"] = tuple(given["operations"])
    if rows == "demonstrations" and "num_prompts" in options:
        given["demonstrations"] = options["num_prompts"]
    return ArithmeticOptions(**given)


def _keep_first(path: Path, count: int) -> None:
    with path.open("rb") as file:
        lines = list(itertools.islice(file, count))
    write_durably(path, b"".join(lines))
