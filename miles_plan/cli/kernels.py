"""`miles-plan kernels`: what the batch-invariant kernels promise, and whether they keep it on this machine's GPU."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from miles_plan.cli.options import AsJson
from miles_plan.diagnostics import PlanError, error

if TYPE_CHECKING:
    from miles_plan.kernels.cuda.verify import OpReport, Report

kernels = typer.Typer(
    name="kernels",
    help="The batch-invariant kernels: what is promised, and whether it holds on this machine's GPU.",
    no_args_is_help=True,
)

Seconds = Annotated[float, typer.Option("--seconds", min=0.0, help="How long to draw; every check runs at least once.")]
Seed = Annotated[
    int, typer.Option("--seed", min=0, help="Seed of the first draw; a report names the seed that shows a difference.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes that share the GPU; by default one a core, at most sixteen.")
]


@kernels.command()
def verify(seconds: Seconds = 60.0, seed: Seed = 0, workers: Workers = None, as_json: AsJson = False) -> None:
    """Compare every kernel with itself on random shapes, positions and neighbours, bit for bit, on this machine's GPU.

    Exit code 0: no bit differed. 1: some did, or a kernel failed; the first op is named with the shape that shows it.
    """
    from miles_plan.cli.kernel_requirements import require_torch_and_triton

    require_torch_and_triton()
    from miles_plan.kernels.cuda.verify import verify as draw

    report = draw(seconds=seconds, seed=seed, workers=workers)
    if as_json:
        sys.stdout.write(json.dumps({"schema": "miles-plan/kernels-verify/1", **report.to_dict()}, indent=2) + "\n")
    else:
        _print(report)
    if report.first is not None:
        raise PlanError((error("MP456", _what_differs(report.first), help=_how_to_see_it(report.first)),))


@kernels.command(name="list")
def list_checks(as_json: AsJson = False) -> None:
    """List what `verify` compares: op, dtypes, and the two ways of computing that must agree."""
    from miles_plan.cli.kernel_requirements import require_torch

    require_torch()
    from miles_plan.kernels.cuda.invariance_checks import CHECKS

    rows = [
        {
            "op": check.name,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in check.dtypes],
            "compares": " ".join((check.run.__doc__ or "").split()),
        }
        for check in CHECKS
    ]
    if as_json:
        sys.stdout.write(json.dumps({"schema": "miles-plan/kernels/1", "checks": rows}, indent=2) + "\n")
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from miles_plan.cli.console import console

    table = Table(box=SIMPLE_HEAD)
    for title in ("op", "dtypes", "compares"):
        table.add_column(title, no_wrap=title == "op")
    for row in rows:
        table.add_row(str(row["op"]), ", ".join(row["dtypes"]), str(row["compares"]))
    console().print(table)


def _print(report: Report) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from miles_plan.cli.console import console

    table = Table(box=SIMPLE_HEAD)
    table.add_column("op", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("draws", justify="right")
    table.add_column("differing bits in", justify="right")
    for op in report.ops:
        table.add_row(op.op, op.dtype, f"{op.draws:,}", op.error or f"{op.differing_elements:,} elements")
    out = console()
    out.print(
        f"{report.gpu}, torch {report.torch_version}, triton {report.triton_version}, {report.seconds:.0f} s", markup=False
    )
    out.print(table)
    if report.ok:
        out.print(f"every op is invariant: {sum(op.draws for op in report.ops):,} comparisons, 0 differing bits", markup=False)


def _what_differs(op: OpReport) -> str:
    if op.error is not None:
        return f"{op.op} ({op.dtype}) fails: {op.error}"
    if op.draws == 0:
        return f"{op.op} ({op.dtype}) was not drawn"
    return f"{op.op} ({op.dtype}) is the first op that differs: {op.differing_elements:,} elements, first at {op.first_shape}"


def _how_to_see_it(op: OpReport) -> str:
    if op.first_seed is None:
        return "`exact` alignment needs every op; report the message with the GPU and the versions above"
    again = f"miles-plan kernels verify --seconds 0 --seed {op.first_seed}"
    return f"`{again}` shows it again; do not train with `exact` alignment on this GPU"
