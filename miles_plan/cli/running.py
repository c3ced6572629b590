"""What `run` and `resume` share: the packages they need, how an end is shown, and the exit code it means."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from miles_plan.cli.console import console
from miles_plan.cli.exit_code import ExitCode
from miles_plan.cli.findings import show_findings
from miles_plan.diagnostics import Diagnostic, PlanError, error

if TYPE_CHECKING:
    from miles_plan.backends.executor.run import Result

NEEDED = ("ray", "torch", "transformers", "safetensors")


def need_packages() -> None:
    """PlanError (MP423) naming every package of `[run]` that is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        what = f"running needs {', '.join(missing)}, which {verb} not installed"
        raise PlanError((error("MP423", what, help="pip install 'miles-plan[run]'"),))


def carry_out(work: Callable[[], Result], root: Path) -> None:
    """Do the work, show how it ended, and exit with the code that this means."""
    from miles_plan.backends.executor.failures import InterruptedRunError, RunError
    from miles_plan.backends.executor.run_directory import RunDirectoryError

    try:
        result = work()
    except (InterruptedRunError, KeyboardInterrupt):
        sys.stderr.write("stopped" + _how_to_continue(root))
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except RunDirectoryError as problem:
        raise PlanError((error("MP506", str(problem)),)) from None
    except RunError as problem:
        _show_failure(problem.diagnostic, root if problem.resumable else None)
        raise typer.Exit(ExitCode.RUN_FAILED_CAN_RESUME if problem.resumable else ExitCode.RUN_FAILED_CANNOT_RESUME) from None
    show_result(result)


def show_result(result: Result) -> None:
    """The figures of a run that reached its end, and where everything lies."""
    from miles_plan.report.html import write_run_report
    from miles_plan.report.measured import table, write_measured
    from miles_plan.report.perfetto import write_trace
    from miles_plan.report.run_files import read_run
    from miles_plan.report.start import engine_texts, start_text

    root = result.directory.root
    report, trace = write_run_report(root), root / "trace.json"
    write_trace(root, trace)
    measured, found = write_measured(root)
    summary: Mapping[str, Any] = result.summary
    out = console()
    out.print(f"\n{result.name}: {summary['steps']} steps in {summary['wall_s']:.1f} s", markup=False)
    record = read_run(root)
    start = [("start", start_text(record)), *(("", text) for text in engine_texts(record))]
    for name, text in [*_figures(summary), *start]:
        out.print(f"  {name:<22} {text}", markup=False, soft_wrap=True)
    out.print()
    if found.memory:
        for line in (*table(found), ""):
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    places = {"report": report, "metrics": result.directory.metrics, "checkpoints": result.directory.checkpoints}
    places |= {"policy": result.directory.final, "trace (Perfetto)": trace, "summary": result.directory.summary}
    places["planned, measured"] = measured
    for name, path in places.items():
        out.print(f"  {name:<22} {path}", markup=False, soft_wrap=True)


def _figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    figures = []
    if summary["reward_first"] is not None:
        figures.append(("mean reward", f"{summary['reward_first']:.3f} -> {summary['reward_last']:.3f}"))
    if summary["max_abs_logprob_diff"] is not None:
        compared = f"over {summary['tokens_compared']:,} tokens"
        figures.append(("log-prob difference", f"{summary['max_abs_logprob_diff']:g} at most, {compared}"))
        figures.append(("routing mismatches", f"{summary['routing_mismatches']:,}"))
    figures.append(("restarts", str(summary["restarts"])))
    figures.append(("weights", str(summary["final_weights_sha256"])[:16]))
    return figures


def _show_failure(diagnostic: Diagnostic, resumable: Path | None) -> None:
    show_findings([diagnostic], {})
    if resumable is not None and (resumable / "run.json").exists():
        sys.stderr.write("the run can go on" + _how_to_continue(resumable))


def _how_to_continue(root: Path) -> str:
    return f"; continue with: miles-plan resume {root}\n" if (root / "run.json").exists() else "\n"
