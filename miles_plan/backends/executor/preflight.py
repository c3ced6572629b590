"""What can be checked in a second or two before Ray starts: what is supported, data files, tokenizer, room on disk."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator
from pathlib import Path

from miles_plan.backends.executor.checkpoint_files import mismatches
from miles_plan.backends.executor.data_sources import Rows, source_file
from miles_plan.backends.executor.device_memory import visible_gpus
from miles_plan.backends.executor.host import code_path, model_config, open_tokenizer
from miles_plan.backends.executor.run_directory import RunDirectory
from miles_plan.backends.executor.unsupported import unsupported
from miles_plan.catalog.hf_config import architecture_from_hf_config
from miles_plan.data.demonstrations import check_demonstrations
from miles_plan.data.problem import DataError
from miles_plan.data.prompts import check_prompts
from miles_plan.diagnostics import Diagnostic, Location, error
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import Evaluate, Prompts, Reward
from miles_plan.rewards.registry import RewardError, locate

LISTED_MISMATCHES = 5


def preflight(plan: Plan, directory: RunDirectory) -> list[Diagnostic]:
    """Everything that would stop the run early, all at once. Data that a generator makes is made here."""
    found = unsupported(plan)
    said = " ".join(finding.message for finding in found)
    found += [*_environment(plan, said), *_gpus(plan)]
    if not found:
        found = [*_model(plan), *_tokenizer(plan), *_data(plan, directory.data), *_rewards(plan)]
    return found


def _environment(plan: Plan, said: str) -> Iterator[Diagnostic]:
    """The releases and settings that the plan was made for, but for packages of which an engine has `said` it already."""
    for name, wanted in plan.environment:
        if name in said:
            continue
        if name.startswith("env:"):
            variable = name.removeprefix("env:")
            found = os.environ.get(variable)
            if found != wanted:
                yield error(
                    "MP424",
                    f"the plan needs {variable}={wanted}, it is {found or 'not set'}",
                    help=f"export {variable}={wanted}",
                )
            continue
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield error("MP423", f"the plan needs {name} {wanted}, which is not installed", help=_get(name, wanted))
            continue
        if not satisfies(installed, wanted):
            yield error(
                "MP424", f"the plan needs {name} {wanted}, {installed} is installed", help=f"pip install '{name}{_pin(wanted)}'"
            )


def _get(name: str, wanted: str) -> str:
    """How to get a package in the release that the plan wants."""
    exact = f"pip install '{name}{_pin(wanted)}'"
    return "pip install 'miles-plan[run]'" if wanted.startswith(">=") else f"{exact}; `miles-plan doctor` lists what fits it"


def _gpus(plan: Plan) -> Iterator[Diagnostic]:
    """Whether there are as many GPUs as the plan uses; which kind they are, Ray says when it starts."""
    if plan.cluster.gpu == "cpu":
        return
    needed = max((group.gpus.end for group in plan.graph.groups if group.gpus is not None), default=0)
    if (found := len(visible_gpus())) < needed:
        gpus = "GPU" if needed == 1 else "GPUs"
        yield error(
            "MP422",
            f"the plan uses {needed} {gpus} ({plan.cluster.gpu}), this machine shows {found}",
            field="cluster.gpus_per_node",
            help="compile the spec again for the machine that is there; CUDA_VISIBLE_DEVICES can hide GPUs",
        )


def satisfies(installed: str, wanted: str) -> bool:
    """Whether a release meets a requirement: `>=2.8`, or one release exactly. Local parts such as `+cpu` do not count."""
    numbers = _numbers(installed)
    return numbers >= _numbers(wanted[2:]) if wanted.startswith(">=") else numbers == _numbers(wanted)


def _numbers(release: str) -> tuple[int, ...]:
    """The release's numbers, without zeros at the end, so that 2.8 and 2.8.0 are equal."""
    found = [int(match) for match in re.findall(r"\d+", release.partition("+")[0])[:3]]
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)


def _pin(wanted: str) -> str:
    return wanted if wanted.startswith(">=") else f"=={wanted}"


def _model(plan: Plan) -> Iterator[Diagnostic]:
    checkpoint = plan.run.model.checkpoint
    try:
        config = model_config(plan)
    except (OSError, ValueError) as problem:
        yield error("MP437", f"the model's configuration cannot be read: {problem}", field="model.checkpoint")
        return
    if checkpoint is not None:
        architecture = architecture_from_hf_config(dict(config), plan.run.model.name)
        for mismatch in list(mismatches(architecture, Path(checkpoint)))[:LISTED_MISMATCHES]:
            yield error(
                "MP437",
                f"the checkpoint does not match its configuration: {mismatch}",
                field="model.checkpoint",
                help="use the config.json that belongs to the weights",
            )


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
