from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from miles_plan.cli.diff import diff
from miles_plan.cli.report import report
from miles_plan.cli.show import show
from miles_plan.diagnostics import PlanError
from miles_plan.ir.plan import write_plan
from tests.report.sample_plans import load_plan
from tests.report.sample_run import RunWriter


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    write_plan(load_plan("embedded"), tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return RunWriter(load_plan("embedded")).write(tmp_path / "run", rl_iterations=4)


def test_show_a_plan_a_section_and_a_run(plan_file: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(plan_file)
    assert "Decisions" in capsys.readouterr().out
    show(plan_file, section=["memory"])
    assert capsys.readouterr().out.lstrip().startswith("Memory of each rank of 0..1")
    show(run_dir)
    assert "Plan and run of loop 'rl'" in capsys.readouterr().out
    show(plan_file, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(plan_file.read_text(encoding="utf-8"))
    with pytest.raises(typer.BadParameter, match="no section 'memori'"):
        show(plan_file, section=["memori"])


def test_report_of_a_plan_lies_beside_it(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(plan_file)
    assert capsys.readouterr().out == f"{plan_file.with_suffix('.html')}\n"
    report(plan_file, out=plan_file.parent / "a.html", trace=plan_file.parent / "a.json")
    assert {"plan.html", "a.html", "a.json"} <= {path.name for path in plan_file.parent.iterdir()}


def test_report_of_a_run_lies_in_it(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(run_dir)
    written = (run_dir / name for name in ("report.html", "trace.json", "measured.json"))
    assert capsys.readouterr().out == "".join(f"{path}\n" for path in written)
    assert json.loads((run_dir / "trace.json").read_text(encoding="utf-8"))["otherData"]["plan"] == "quickstart"


def test_diff_says_same_or_different(plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diff(plan_file, plan_file)
    assert capsys.readouterr().out.startswith("No difference: both are plan ")
    plan = load_plan("embedded")
    write_plan(replace(plan, decisions=plan.decisions[1:]), tmp_path / "other.json")
    with pytest.raises(typer.Exit) as ended:
        diff(plan_file, tmp_path / "other.json")
    assert ended.value.exit_code == 3
    assert "- placement  value colocate" in capsys.readouterr().out
    with pytest.raises(typer.Exit) as ended:
        diff(plan_file, tmp_path / "other.json", as_json=True)
    assert ended.value.exit_code == 3
    assert [each["kind"] for each in json.loads(capsys.readouterr().out)["changes"]] == ["removed"]


def test_a_spec_is_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = Path(__file__).parent.parent.parent / "specs" / "quickstart.yaml"
    show(spec, section=["summary"])
    assert capsys.readouterr().out.startswith("quickstart")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema_version": 99, "plan": {}}', None])
def test_what_is_no_plan_is_refused_with_a_finding(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    for command in (lambda: show(path), lambda: report(path), lambda: diff(path, path), lambda: show(tmp_path)):
        with pytest.raises(PlanError, match=r"error\[MP402\].*plan\.json"):
            command()


def test_a_report_that_cannot_be_written_is_refused_with_a_finding(plan_file: Path) -> None:
    with pytest.raises(PlanError, match=r"error\[MP403\]"):
        report(plan_file, out=plan_file / "below" / "a.html")
