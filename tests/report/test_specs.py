"""Every spec of the repository compiles to a plan that can be shown in each form."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from miles_plan.passes.compile import compile_job
from miles_plan.report.html import plan_html
from miles_plan.report.perfetto import plan_trace
from miles_plan.report.terminal import render_plan
from miles_plan.spec import load_job
from tests.report.test_html import assert_offline, assert_sound
from tests.report.test_perfetto import assert_chrome_trace

SPECS = sorted((Path(__file__).parent.parent.parent / "specs").glob("*.yaml"))


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.stem)
def test_the_plan_of_a_spec_can_be_shown(spec: Path) -> None:
    plan = compile_job(load_job(str(spec), [])).plan
    file = io.StringIO()
    render_plan(plan, Console(file=file, width=80), full=True)
    assert max(map(len, file.getvalue().splitlines())) <= 80
    text = plan_html(plan)
    assert_sound(text)
    assert_offline(text)
    assert len(text) < 1_000_000
    assert_chrome_trace(plan_trace(plan, iterations=3))
