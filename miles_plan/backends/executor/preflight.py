"""What can be checked in a second or two before Ray starts: what is supported, data files, tokenizer, room on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from miles_plan.backends.executor.data_sources import Rows, source_file
from miles_plan.backends.executor.host import code_path, model_config, open_tokenizer
from miles_plan.backends.executor.run_directory import RunDirectory
from miles_plan.backends.executor.unsupported import unsupported
from miles_plan.data.demonstrations import check_demonstrations
from miles_plan.data.problem import DataError
from miles_plan.data.prompts import check_prompts
from miles_plan.diagnostics import Diagnostic, Location, error
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import Evaluate, Prompts, Reward
from miles_plan.rewards.registry import RewardError, locate


def preflight(plan: Plan, directory: RunDirectory) -> list[Diagnostic]:
    """Everything that would stop the run early, all at once. Data that a generator makes is made here."""
    found = unsupported(plan)
    if not found:
        found = [*_model(plan), *_tokenizer(plan), *_data(plan, directory.data), *_rewards(plan)]
    return found


def _model(plan: Plan) -> Iterator[Diagnostic]:
    try:
        model_config(plan)
    except (OSError, ValueError) as problem:
        yield error("MP437", f"the model's configuration cannot be read: {problem}", field="model.checkpoint")


def _tokenizer(plan: Plan) -> Iterator[Diagnostic]:
    try:
        tokenizer = open_tokenizer(plan.run.tokenizer)
        vocab_size = int(model_config(plan).get("vocab_size", 0))
    except DataError as problem:
        yield from _data_findings(problem)
        return
    except (OSError, ValueError) as problem:
        yield error("MP438", f"the tokenizer cannot be opened: {problem}", field="model.tokenizer")
        return
    if tokenizer.vocab_size > vocab_size:
        yield error(
            "MP438",
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary is {vocab_size}",
            field="model.tokenizer",
            help="use the model's own tokenizer, or a model with a larger vocab_size",
        )


def _data(plan: Plan, folder: Path) -> Iterator[Diagnostic]:
    seen = set()
    for task in plan.graph.tasks:
        if isinstance(task, Prompts | Evaluate):
            rows: Rows = task.rows if isinstance(task, Prompts) else "evaluation"
            if (task.source, rows) in seen:
                continue
            seen.add((task.source, rows))
            try:
                path = source_file(plan.run, task.source, rows, folder)
                check_demonstrations(path) if rows == "demonstrations" else check_prompts(path)
            except DataError as problem:
                yield from _data_findings(problem)
            except ValueError as problem:
                yield error("MP439", f"data source '{task.source}': {problem}", field=task.source)


def _rewards(plan: Plan) -> Iterator[Diagnostic]:
    """Rewards are looked up and not run; whether one can be loaded shows when its workers start."""
    for name in dict.fromkeys(task.reward for task in plan.graph.tasks if isinstance(task, Reward | Evaluate)):
        try:
            locate(name, code_path(plan.run))
        except RewardError as problem:
            yield error("MP441", str(problem), field="data.reward")


def _data_findings(problem: DataError) -> Iterator[Diagnostic]:
    """One finding a bad line, with its place."""
    for each in problem.problems:
        where = Location(each.path, each.line, each.column)
        yield error("MP440", each.message, where, help="every line is one JSON object; see docs/running.md")
    if problem.total > len(problem.problems):
        yield error("MP440", f"and {problem.total - len(problem.problems)} more bad lines", Location(problem.problems[0].path))
