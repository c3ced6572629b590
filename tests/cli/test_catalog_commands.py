from __future__ import annotations

import json

import pytest

from miles_plan.catalog.gpus import gpu_names
from miles_plan.catalog.models import model_names
from miles_plan.cli.gpus import gpus
from miles_plan.cli.models import models
from miles_plan.cli.schema import schema


def test_every_model_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    models()
    text = capsys.readouterr().out
    assert all(f" {name} " in text for name in model_names())
    assert max(map(len, text.splitlines())) <= 120


def test_models_are_filtered_and_have_figures(capsys: pytest.CaptureFixture[str]) -> None:
    models("qwen3-30b-a3b", as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == "miles-plan/models/1"
    row = next(row for row in result["models"] if row["name"] == "qwen3-30b-a3b")
    assert (row["layers"], row["experts"], row["experts_per_token"]) == (48, 128, 8)
    assert 30e9 < row["params_total"] < 31e9


def test_every_gpu_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    gpus()
    text = capsys.readouterr().out
    assert all(f" {name} " in text for name in gpu_names())
    gpus(as_json=True)
    rows = json.loads(capsys.readouterr().out)["gpus"]
    assert next(row for row in rows if row["name"] == "h200")["gpus_per_node"] == 8


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    schema()
    assert json.loads(capsys.readouterr().out)["title"] == "miles-plan job spec"
