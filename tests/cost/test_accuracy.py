"""The figures the estimates are held to, a little above what they are: a change that makes one worse fails here."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest

from miles_plan.cost.validate import load_rows, validate
from miles_plan.cost.validation.report import Summary, ValidationReport

ROWS = Path(__file__).parent / "rows"


@lru_cache
def report() -> ValidationReport:
    rows = [
        row for name in ("published_numbers", "megatron_h200", "launch_configs") for row in load_rows(ROWS / f"{name}.jsonl")
    ]
    return validate(rows)


def of(kind: str) -> Summary:
    return next(each for each in report().kinds if each.kind == kind)


@pytest.mark.parametrize(
    ("kind", "rows", "median", "p90", "worst"),
    [
        ("Megatron peak memory", 78, 0.0005, 0.003, 0.006),
        ("Megatron step time", 51, 0.05, 0.14, 0.30),
        ("Megatron forward pass", 51, 0.055, 0.125, 0.25),
        ("training memory", 52, 0.018, 0.065, 0.15),
        ("training step time", 368, 0.069, 0.195, 0.75),
        ("decode time per token", 144, 0.093, 0.25, 0.75),
        ("RL step time", 28, 0.10, 0.33, 0.85),
        ("weight sync", 21, 0.078, 0.255, 0.75),
    ],
)
def test_errors_stay_where_they_are(kind: str, rows: int, median: float, p90: float, worst: float) -> None:
    found = of(kind)
    assert found.n >= rows
    assert found.median <= median
    assert found.p90 <= p90
    assert found.worst <= worst


def test_nine_truths_in_ten_lie_in_their_intervals() -> None:
    for each in report().kinds:
        assert 0.85 <= each.coverage <= 0.95, f"{each.kind}: {each.coverage:.0%}"


def test_rows_that_state_a_job_become_one() -> None:
    assert report().ok
    assert report().mapped_share > 0.99


def test_no_run_that_ran_out_of_memory_was_said_to_fit() -> None:
    assert len(report().ran_out) >= 4
    assert [each.name for each in report().ran_out if each.said_to_fit] == []


def test_launch_configurations_that_name_their_gpu_are_said_to_fit_unless_they_cannot() -> None:
    stated = [each for each in report().launched if each.gpu_stated]
    assert len(stated) >= 17
    refused = {each.name: each.defect for each in stated if not each.fits}
    # Both put all of a 355 B-parameter model's training state on one node of four GPUs; the script itself says of so few
    # nodes that they are "not really runnable" (Miles, scripts/run_glm45_355b_a32b.py), and its documentation says "debug".
    assert set(refused) == {"miles:scripts.run_glm45_355b_a32b#1", "miles:scripts.run_glm45_355b_a32b#2"}
    assert all("GPUs of this kind, the layout has 4" in defect for defect in refused.values())


def test_a_layout_that_megatron_would_refuse_is_named() -> None:
    slime = next(each for each in report().launched if each.name == "slime:scripts.run-glm4.7-30B-A3B#1")
    assert slime.defect == "ep x etp = 8 must divide tp x cp x dp = 4"


def test_the_page_holds_every_kind_and_every_reason() -> None:
    page = report().markdown()
    assert page.startswith("# Accuracy of the estimates")
    for each in report().kinds:
        assert f"| {each.kind} | {each.n} |" in page
    assert "search_time" not in page
    assert "seq_len is not stated" in page or "tokens of a microbatch are not stated" in page
