from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from miles_plan.cli.app import app
from miles_plan.diagnostics import PlanError
from miles_plan.kernels.cuda import verify as verify_module
from miles_plan.kernels.cuda.verify import OpReport, Report

FINE = OpReport("rms_norm", "bfloat16", draws=1200)
ODD = OpReport("swiglu", "float16", 300, 2, 17, "rows 3:4 of 7, width 96", 12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_finding_says_what_to_do() -> None:
    result = CliRunner().invoke(app, ["kernels", "verify"])
    assert isinstance(result.exception, PlanError)
    (finding,) = result.exception.diagnostics
    assert finding.code == "MP455"
    assert "NVIDIA GPU" in finding.help


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[OpReport]:
    """The ops that a verification of this machine reports; its GPU is stood in for."""
    ops: list[OpReport] = []
    monkeypatch.setattr("miles_plan.cli.kernel_requirements.require_torch_and_triton", lambda: None)
    monkeypatch.setattr(verify_module, "verify", lambda **_: Report("NVIDIA H200", "2.11.0", "3.6.0", "2026-01-01", 60.2, ops))
    return ops


def test_a_table_and_exit_code_0_when_nothing_differs(reported: list[OpReport]) -> None:
    reported.append(FINE)
    result = CliRunner().invoke(app, ["kernels", "verify"])
    assert result.exit_code == 0
    assert "NVIDIA H200, torch 2.11.0, triton 3.6.0, 60 s" in result.output
    assert "rms_norm" in result.output
    assert "1,200 comparisons, 0 differing bits" in result.output


def test_the_first_op_that_differs_is_a_finding(reported: list[OpReport]) -> None:
    reported += [FINE, ODD]
    result = CliRunner().invoke(app, ["kernels", "verify"])
    assert "17 elements" in result.output
    assert isinstance(result.exception, PlanError)
    (finding,) = result.exception.diagnostics
    assert finding.code == "MP456"
    assert finding.message == "swiglu (float16) is the first op that differs: 17 elements, first at rows 3:4 of 7, width 96"
    assert "--seconds 0 --seed 12" in finding.help


def test_an_op_that_fails_is_a_finding(reported: list[OpReport]) -> None:
    reported.append(OpReport("rope", "float32", error="RuntimeError: out of memory (seed 4)"))
    result = CliRunner().invoke(app, ["kernels", "verify", "--json"])
    assert isinstance(result.exception, PlanError)
    assert "rope (float32) fails: RuntimeError: out of memory" in result.exception.diagnostics[0].message
    found = json.loads(result.output)
    assert found["schema"] == "miles-plan/kernels-verify/1"
    assert not found["ok"]


def test_list_names_every_check() -> None:
    found = json.loads(CliRunner().invoke(app, ["kernels", "list", "--json"]).output)
    by_op = {row["op"]: row for row in found["checks"]}
    assert by_op["attention"]["dtypes"] == ["bfloat16", "float16"]
    assert "chunks, prefix hits and pages" in by_op["attention"]["compares"]
    assert "matmul tensor parallel" in CliRunner().invoke(app, ["kernels", "list"]).output
