"""Each pass as text: a spec, and beside it what the pass changed in the graph and what it decided."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles_plan.passes.compile import compile_job
from miles_plan.passes.instruments import DiffAfter
from miles_plan.passes.pipeline import DEFAULT
from miles_plan.spec import load_job
from tests.conftest import Golden

PASSES = Path(__file__).parent.parent / "golden" / "passes"
CASES = sorted(path.relative_to(PASSES) for path in PASSES.glob("*/*.yaml"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_pass_changes(case: Path, golden: Golden) -> None:
    name, written = case.parent.name, []
    compiled = compile_job(load_job(PASSES / case), instruments=[DiffAfter(frozenset({name}), written.append)])
    decisions = [
        f"# {decision.field}: {decision.value}  ({decision.reason})\n"
        for decision in compiled.plan.decisions
        if decision.by == name
    ]
    golden.check(f"passes/{case.with_suffix('.diff')}", "".join([*decisions, *written]))


def test_every_pass_has_a_golden_case() -> None:
    assert {each.name for each in DEFAULT} == {case.parent.name for case in CASES}


def test_no_golden_diff_is_left_over() -> None:
    assert {path.relative_to(PASSES) for path in PASSES.glob("*/*.diff")} == {case.with_suffix(".diff") for case in CASES}
