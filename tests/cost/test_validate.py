from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.cost.validate import load_rows, validate
from miles_plan.cost.validation.report import Checked, Unmapped, ValidationReport, summarize

TRAIN = {
    "source": "github.com/some/thing docs/table.md @abc123 (2026-01-01)",
    "kind": "train_throughput",
    "model": "Qwen3-8B",
    "hardware": "H100",
    "num_gpus": 8,
    "tp": 2,
    "seq_len": 4096,
    "global_batch": 64,
    "micro_batch": 1,
    "precision": "bf16",
    "metric": "tokens_per_sec_per_gpu",
    "value": 9000,
    "unit": "tokens/s/GPU",
}


def reason(row: dict[str, object]) -> Unmapped:
    (left_out,) = validate([row]).unmapped
    return left_out


def test_a_row_becomes_a_job_and_an_error() -> None:
    (checked,) = validate([TRAIN]).checked
    assert checked.kind == "training step time"
    assert checked.source == "some/thing docs/table.md"
    assert -0.5 < checked.error < 0.5


def test_a_faster_truth_makes_the_estimate_too_slow() -> None:
    slow, fast = validate([TRAIN, TRAIN | {"value": 18000}]).checked
    assert fast.error == pytest.approx(2 * (1 + slow.error) - 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_gpus": None}, "num_gpus is not stated"),
        ({"tp": None}, "no parallel size is stated"),
        ({"seq_len": None}, "seq_len is not stated"),
        ({"global_batch": None}, "global_batch is not stated"),
        ({"hardware": None}, "hardware is not stated"),
        ({"tp": 3}, "tp x pp x cp = 3 does not divide num_gpus = 8"),
        ({"metric": "MFU"}, "MFU is not a time or a rate"),
        ({"model_tflops_per_gpu": 9000.0}, "differ"),
        ({"value": -1}, "not a positive number"),
        ({"value": "many"}, "malformed"),
    ],
)
def test_what_a_row_leaves_out_is_its_own_fault(change: dict[str, object], words: str) -> None:
    left_out = reason(TRAIN | change)
    assert words in left_out.reason
    assert left_out.incomplete


@pytest.mark.parametrize("change", [{"model": "Unheard-Of-9B"}, {"hardware": "RTX 4090"}, {"kind": "horoscope"}])
def test_what_we_do_not_know_is_ours(change: dict[str, object]) -> None:
    left_out = reason(TRAIN | change)
    assert not left_out.incomplete
    assert not validate([TRAIN | change] * 2 + [TRAIN]).ok


def test_a_batch_follows_from_the_tokens_of_a_step() -> None:
    given = validate([TRAIN]).checked
    derived = validate([TRAIN | {"global_batch": None, "tokens_per_step_derived": 64 * 4096}]).checked
    assert derived == given


def test_other_tools_predictions_stand_beside_ours() -> None:
    rows = [TRAIN | {"sometool_predicted": 9900}, TRAIN]
    ((theirs, ours),) = validate(rows).anchors
    assert (theirs.source, theirs.n) == ("sometool", 1)
    assert theirs.median == pytest.approx(1 - 9000 / 9900)
    assert (ours.source, ours.n) == ("miles-plan", 1)


def test_summaries_are_of_absolute_errors_but_for_the_bias() -> None:
    rows = [Checked("k", "s", at, error, held) for at, (error, held) in enumerate([(-0.4, False), (0.1, True), (-0.2, True)])]
    found = summarize("k", "s", rows)
    assert (found.n, found.median, found.worst) == (3, 0.2, 0.4)
    assert found.bias == -0.2
    assert found.coverage == pytest.approx(2 / 3)


def test_an_empty_report_is_no_failure() -> None:
    empty = ValidationReport((), (), (), ())
    assert empty.ok
    assert empty.kinds == ()


def test_the_json_form_is_plain() -> None:
    report = validate([TRAIN, TRAIN | {"model": "Unheard-Of-9B"}])
    assert json.loads(json.dumps(report.to_json()))["mapped_share"] == 0.5


def test_files_are_read_a_line_a_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(TRAIN) + "\n\n" + json.dumps(TRAIN) + "\n")
    assert load_rows(file) == [TRAIN, TRAIN]
    file.write_text("{}\nnot json\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not JSON"):
        load_rows(file)
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match="not a JSON object"):
        load_rows(file)


def test_memory_rows_compare_bytes_in_the_rows_unit() -> None:
    row = TRAIN | {"kind": "memory", "metric": "peak_allocated", "value": 40.0, "unit": "GiB"}
    gib, gb = validate([row, row | {"unit": "GB"}]).checked
    assert (1 + gb.error) / (1 + gib.error) == pytest.approx((1 << 30) / 1e9)
    assert "unit is not bytes" in reason(row | {"unit": "apples"}).reason
    assert "tokens of a microbatch" in reason(row | {"micro_batch": None}).reason


def test_a_run_that_ran_out_is_said_not_to_fit_or_named() -> None:
    row = TRAIN | {"kind": "memory", "metric": "peak_allocated", "value": 79.0, "unit": "GiB", "notes": "OOM in step 2"}
    small = validate([row]).ran_out
    assert [each.said_to_fit for each in small] == [True]
    large = validate([row | {"model": "Qwen3-32B"}]).ran_out
    assert [each.said_to_fit for each in large] == [False]
    assert "Runs that ran out" in validate([row]).markdown()


def test_weight_sync_rows_name_their_transport() -> None:
    row = {
        "source": "x",
        "kind": "weight_sync",
        "model": "Qwen3-30B-A3B",
        "hardware": "H100-80GB",
        "num_gpus": 32,
        "train_parallel": "TP4 PP1 CP1 EP8 ETP1, 2 nodes",
        "gen_parallel": "TP8 EP8, 2 nodes",
        "method": "NCCL broadcast",
        "bucket_gib": 1,
        "metric": "update_weights_time",
        "value": 2670.0,
        "unit": "ms",
    }
    (checked,) = validate([row]).checked
    assert abs(checked.error) < 0.3
    assert "transport is not stated" in reason(row | {"method": "magic"}).reason
    assert "measured before a fix" in reason(row | {"method": "NCCL before fix"}).reason


def test_rl_rows_tell_colocated_from_overlapped() -> None:
    row = {
        "source": "x",
        "kind": "rl_step_time",
        "model": "Qwen3-30B3A",
        "hardware": "DGX-H100",
        "num_gpus": 32,
        "policy_mode": "On policy",
        "gen_parallel": "TP,PP=[2,1]",
        "train_parallel": "TP,CP,EP,PP,VPP=[1,1,8,1,n/a]",
        "precision": "Training BF16, Generation BF16",
        "seq_len": 4096,
        "avg_seq_len": 3203,
        "gen_batch": 2048,
        "global_batch": 512,
        "metric": "step_time",
        "value": 192,
        "unit": "s",
    }
    on_policy, off_policy = validate([row, row | {"policy_mode": "1-step Off"}]).checked
    assert abs(on_policy.error) < 0.5
    assert off_policy.error != on_policy.error
    assert "avg_seq_len is not stated" in reason(row | {"avg_seq_len": None}).reason
    assert "not readable" in reason(row | {"gen_parallel": "two"}).reason


@given(
    row=st.sampled_from([TRAIN, TRAIN | {"kind": "memory", "metric": "peak_allocated", "unit": "GB"}]),
    change=st.dictionaries(
        st.sampled_from([*TRAIN, "pp", "ep", "cp", "vpp", "etp", "fsdp", "recompute", "model_tflops_per_gpu"]),
        st.sampled_from([None, 0, -1, 3, 7, 1e9, True, "x", "", [], {}, math.nan]),
        max_size=4,
    ),
)
@settings(max_examples=150, deadline=None)
def test_no_row_brings_the_validation_down(row: dict[str, object], change: dict[str, object]) -> None:
    report = validate([row | change])
    assert len(report.checked) + len(report.unmapped) == 1
    assert report.markdown()
