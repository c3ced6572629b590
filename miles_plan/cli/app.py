"""The `miles-plan` command: which commands there are, and what happens to what they raise.

A command is a module of its own beside this one, with one function of the command's name that parses arguments and prints;
it imports what is heavy inside the function. To add one, import it here and put it into COMMANDS. `kernels` has commands of its
own.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from miles_plan import __version__
from miles_plan.cli.calibrate import calibrate
from miles_plan.cli.check import check
from miles_plan.cli.compile import compile, estimate
from miles_plan.cli.diff import diff
from miles_plan.cli.doctor import doctor
from miles_plan.cli.explain import explain
from miles_plan.cli.findings import show_findings
from miles_plan.cli.gpus import gpus
from miles_plan.cli.internal_error import show_internal_error
from miles_plan.cli.kernels import kernels
from miles_plan.cli.models import models
from miles_plan.cli.report import report
from miles_plan.cli.resume import resume
from miles_plan.cli.run import run
from miles_plan.cli.schema import schema
from miles_plan.cli.show import show
from miles_plan.cli.status import status
from miles_plan.cli.validate import validate
from miles_plan.diagnostics import PlanError

COMMANDS = (
    # in the order of a job's life
    check,
    compile,
    estimate,
    show,
    diff,
    run,
    resume,
    status,
    report,
    explain,
    calibrate,
    validate,
    schema,
    models,
    gpus,
    doctor,
)

app = typer.Typer(
    name="miles-plan",
    help="A compiler for RL post-training of large language models: plan it, price it, run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for each in COMMANDS:
    app.command()(each)
app.add_typer(kernels)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"miles-plan {__version__}\n")
        raise typer.Exit


def main() -> None:
    """Run the command line. No traceback reaches the user: findings exit with 1, our own bugs with 2 and a place to report."""
    for stream in (sys.stdout, sys.stderr):  # a file name or a model name must not fail to print in an ASCII locale
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except PlanError as problem:
        sys.exit(show_findings(problem.diagnostics, problem.sources))
    except Exception as problem:
        sys.exit(show_internal_error(problem))
