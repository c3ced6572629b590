"""What stands between a plan and SGLang on this machine: said before anything starts, without importing it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from miles_plan.backends.sglang_engine.server_arguments import ArgumentsError, server_arguments
from miles_plan.diagnostics import Diagnostic, error
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.plan import Plan


def problems(plan: Plan, group: DeviceGroup) -> Iterator[Diagnostic]:
    """Findings, each of which stops the run."""
    layout = group.rollout_layout
    assert layout is not None, "a rollout group has a rollout layout"
    if layout.pp > 1:
        yield error(
            "MP442",
            f"@{group.name}: an SGLang engine of {layout.pp} pipeline stages; new weights reach the ranks of one stage only",
            field="rollout.layout.pp",
            help="use rollout.layout.tp for models that need several GPUs",
        )
    try:
        server_arguments(plan, group, model_directory=Path("model"))
    except ArgumentsError as problem:
        yield error(problem.code, f"@{group.name}: {problem}", field=problem.field, help=problem.remedy)
