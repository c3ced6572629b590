from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from miles_plan.cli.app import app
from miles_plan.diagnostics import PlanError

ROW = {
    "source": "a table",
    "kind": "train_throughput",
    "model": "Qwen3-30B-A3B",
    "hardware": "H100",
    "num_gpus": 8,
    "tp": 1,
    "pp": 1,
    "cp": 1,
    "ep": 8,
    "precision": "BF16",
    "seq_len": 4096,
    "global_batch": 512,
    "micro_batch": 1,
    "metric": "tokens_per_sec_per_gpu",
    "value": 12000,
    "unit": "tokens/s/GPU",
}


def test_a_row_is_priced_and_compared(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    result = CliRunner().invoke(app, ["validate", str(file), "--json"])
    assert result.exit_code == 0
    report = json.loads(result.output)
    assert [kind["n"] for kind in report["kinds"]] == [1]
    assert "| training step time | 1 |" in CliRunner().invoke(app, ["validate", str(file)]).output


@pytest.mark.parametrize("text", ["[1]\n", "{\n"])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + text)
    result = CliRunner().invoke(app, ["validate", str(file)])
    assert isinstance(result.exception, PlanError)
    assert result.exception.diagnostics[0].code == "MP443"
    assert "rows.jsonl:2" in result.exception.diagnostics[0].message


def test_runs_on_real_engines_stand_below_the_rows(tmp_path: Path) -> None:
    rows, run, page = tmp_path / "rows.jsonl", tmp_path / "engines.json", tmp_path / "accuracy.md"
    rows.write_text(json.dumps(ROW) + "\n")
    memory = {"phase": "train", "planned_bytes": 100, "measured_bytes": 103, "error": 0.03}
    run.write_text(json.dumps({"spec": "a-run", "planned_against_measured": {"memory": [memory], "times": []}}))
    result = CliRunner().invoke(app, ["validate", str(rows), "--run", str(run), "--out", str(page)])
    assert result.exit_code == 0
    assert "| a-run | train +3.0% |" in page.read_text()
    run.write_text("{}")
    result = CliRunner().invoke(app, ["validate", str(rows), "--run", str(run)])
    assert isinstance(result.exception, PlanError)
    assert result.exception.diagnostics[0].code == "MP443"
