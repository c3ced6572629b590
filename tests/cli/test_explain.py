from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from miles_plan.cli.explain import explain
from miles_plan.diagnostics import PAGES, PlanError
from miles_plan.spec.fields import all_fields
from tests.spec.example import write


def test_every_code_has_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    for code, page in PAGES.items():
        explain(code.lower())
        text = capsys.readouterr().out
        assert text.startswith(f"{code}: {page.title}\n")
        assert page.fix in text


def test_every_field_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for path, entry in all_fields().items():
        explain(field=path.replace("*", "3"))
        text = capsys.readouterr().out
        assert text.startswith(f"{path}\n")
        assert entry.meaning in text


def test_a_field_with_a_unit_and_a_default(capsys: pytest.CaptureFixture[str]) -> None:
    explain(field="data.reward_timeout_s")
    assert capsys.readouterr().out == (
        "data.reward_timeout_s\n\n"
        "  Seconds after which the reward of one sample is killed.\n\n"
        "  value    a number above 0 and at most 604,800\n"
        "  default  10.0\n"
        "  unit     seconds\n"
    )


def test_values_and_origins_of_a_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(tmp_path)
    explain(spec, "rollout.response_tokens", sets=["rollout.response_tokens.max=9000"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["rollout.response_tokens.max", "9000", "--set:1:29"],
        ["rollout.response_tokens.mean", "3500.0", f"{spec}:10:38"],
        ["rollout.response_tokens.p99", "8000.0", f"{spec}:10:49"],
        ["rollout.response_tokens.histogram", "null", "default"],
    ]


def test_the_whole_spec_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain(write(tmp_path), as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == "miles-plan/explain/1"
    assert {"field": "seed", "value": 0, "shown": "0", "origin": "default"} in result["values"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"what": "MP129"}, "there is no code MP129"),
        ({"field": "rollout.temprature"}, "did you mean rollout.temperature?"),
        ({"field": "temperature"}, "did you mean rollout.temperature?"),
        ({}, "name a diagnostic code"),
    ],
)
def test_what_cannot_be_explained(arguments: dict[str, str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as left:
        explain(**arguments)  # type: ignore[arg-type]
    assert left.value.exit_code == 2
    assert hint in capsys.readouterr().err


def test_a_field_that_the_spec_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        explain(write(tmp_path), "rollout.temprature")
    assert "did you mean rollout.temperature?" in capsys.readouterr().err


def test_a_spec_with_mistakes_is_no_usage_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        explain(write(tmp_path, "version: 1\n"))


SPEC = """version: 1
name: why
model: {name: qwen3-30b-a3b}
cluster: {gpu: h200, nodes: 1}
algorithm: {kind: grpo}
data: {prompts: {generator: arithmetic}, reward: math}
rollout: {prompts_per_step: 32, samples_per_prompt: 8, response_tokens: {max: 8192, mean: 3500}}
train: {layout: {tp: 2, ep: 8}}
"""


def test_why_not_compares_with_the_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "why.yaml"
    spec.write_text(SPEC)
    explain(str(spec), why_not=["train.tp=4", "rollout.tp=2"], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "miles-plan/why-not/1"
    assert found["asked"] == {"train.tp": "4", "rollout.tp": "2"}
    assert "tp4" in found["best"]["train_layout"]
    assert "tp2" in found["best"]["rollout_layout"]
    explain(str(spec), why_not=["train.tp=4", "rollout.tp=2"])
    text = capsys.readouterr().out
    assert "best such" in text
    assert "train.layout is fixed in the spec" in text


def test_why_not_of_an_impossible_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "why.yaml"
    spec.write_text(SPEC)
    explain(str(spec), why_not=["train.tp=3"])
    assert "It is impossible." in (text := capsys.readouterr().out)
    assert "tp=3 does not divide 32 attention heads" in text


def test_why_not_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "why.yaml"
    spec.write_text(SPEC)
    for asked in (["tran.tp=2"], ["train.tp=x"]):
        with pytest.raises(typer.Exit):
            explain(str(spec), why_not=asked)
    assert "did you mean train.tp?" in capsys.readouterr().err
    with pytest.raises(PlanError):
        explain(str(spec), why_not=["recompute=sometimes"])
    with pytest.raises(typer.Exit):
        explain(why_not=["train.tp=2"])
