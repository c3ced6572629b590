from __future__ import annotations

from pathlib import Path

import pytest

from miles_plan.cli.compile import compile
from miles_plan.cli.plan_files import plan_of
from miles_plan.cli.report import report
from miles_plan.diagnostics import PlanError
from tests.spec.example import SMALL, write


def refused(path: Path) -> str:
    with pytest.raises(PlanError) as caught:
        plan_of(path)
    (finding,) = caught.value.diagnostics
    return finding.code


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"schema_version": 99}', "\x00"])
def test_files_that_are_no_plan(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    assert refused(tmp_path / "plan.json") == "MP402"


def test_plans_that_are_not_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "plan.json") == "MP402"
    assert refused(tmp_path) == "MP402"


def test_a_spec_with_mistakes_is_refused_as_check_would(tmp_path: Path) -> None:
    assert refused(Path(write(tmp_path, SMALL + "colour: red\n"))) == "MP120"


def test_a_page_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    compile(write(tmp_path, SMALL), out=plan)
    capsys.readouterr()
    with pytest.raises(PlanError) as caught:
        report(plan, out=plan / "page.html")
    assert [each.code for each in caught.value.diagnostics] == ["MP403"]
