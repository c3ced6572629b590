"""The command: what it refuses, what it writes, and that nothing is half written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from miles_plan.calibrate.calibration import fitted
from miles_plan.catalog.gpus import find_gpu
from miles_plan.cli.app import app
from miles_plan.cost.profile import load_profile
from miles_plan.diagnostics import PlanError
from tests.calibrate.test_calibration import MACHINE
from tests.calibrate.test_fit import points

Answer = Callable[..., Any]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    """Replaces the minute on a GPU; everything else of the command is real."""
    return lambda answer: monkeypatch.setattr("miles_plan.calibrate.calibration.calibrate_machine", answer)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["calibrate", *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "mine.json"))
    assert isinstance(done.exception, PlanError)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_is_written_and_compared(tmp_path: Path, measured: Callable[[Answer], None]) -> None:
    measured(lambda seconds, tell: fitted(find_gpu("h200"), MACHINE, points()))
    out = tmp_path / "new" / "mine.json"
    done = run("--out", str(out))
    assert done.exit_code == 0
    assert load_profile(out).here is not None
    assert "gemm_fraction.bf16" in done.output
    assert f"profile written to {out}" in done.output.replace("\n", "")


def test_json_is_for_tools(tmp_path: Path, measured: Callable[[Answer], None]) -> None:
    measured(lambda seconds, tell: fitted(find_gpu("h200"), MACHINE, points()))
    done = run("--out", str(tmp_path / "mine.json"), "--json")
    data = json.loads(done.stdout)
    assert data["gpu"] == "h200"
    assert {"name", "measured", "shipped"} == set(data["constants"][0])


def test_an_interrupt_leaves_the_old_file_as_it_was(tmp_path: Path, measured: Callable[[Answer], None]) -> None:
    def interrupted(seconds: float, tell: Callable[[str], None]) -> None:
        tell("launches")
        raise KeyboardInterrupt

    measured(interrupted)
    out = tmp_path / "mine.json"
    out.write_text("as it was")
    done = run("--out", str(out))
    assert done.exit_code == 130
    assert "nothing was written" in done.stderr
    assert out.read_text() == "as it was"
    assert [each.name for each in tmp_path.iterdir()] == ["mine.json"]


def test_an_interrupt_while_writing_leaves_no_piece(
    tmp_path: Path, measured: Callable[[Answer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    measured(lambda seconds, tell: fitted(find_gpu("h200"), MACHINE, points()))
    monkeypatch.setattr("os.replace", interrupted)
    done = run("--out", str(tmp_path / "mine.json"))
    assert done.exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path, measured: Callable[[Answer], None]) -> None:
    def never(seconds: float, tell: Callable[[str], None]) -> None:
        raise AssertionError("measured for nothing")

    measured(never)
    done = run("--out", str(tmp_path))
    assert isinstance(done.exception, PlanError)
    assert "it is a directory" in done.exception.diagnostics[0].message


def test_too_little_time_is_a_usage_error(tmp_path: Path) -> None:
    assert run("--out", str(tmp_path / "mine.json"), "--seconds", "1").exit_code == 2
