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
        ({"value": "many"}, "value is not a number"),
        ({"value": None}, "value is not stated"),
        ({"value": math.nan}, "value is not a number"),
        ({"metric": 7}, "metric is not stated"),
        ({"kind": None}, "its kind is not stated"),
        ({"tp": 0.5}, "tp is 0.5"),
        ({"hardware": "A100", "precision": "nvfp4"}, "a100 has no nvfp4"),
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


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"not json", "not JSON"),
        (b"[" * 100_000, "cannot|not JSON that can be read"),
        (b'{"value": ' + b"9" * 10_000 + b"}", "not JSON that can be read"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b"7", "not a JSON object"),
    ],
)
def test_a_hostile_line_is_named_with_its_file(tmp_path: Path, line: bytes, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"{}\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: ({words})"):
        load_rows(file)


def test_what_is_left_out_says_where_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    # A line separator inside a string is no end of a line, and a mark of the byte order no part of one.
    rows = [TRAIN | {"notes": "a\u2028b"}, TRAIN | {"value": None}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("\ufeff" + text, encoding="utf-8")
    report = validate(load_rows(file))
    assert len(report.checked) == 1
    assert report.unmapped[0].place == f"{file}:2"
    assert "- training step time: value is not stated (1, rows.jsonl:2)" in report.markdown()


def test_numbers_may_be_written_in_digits() -> None:
    assert validate([TRAIN | {"num_gpus": "8", "tp": "2", "value": "9000"}]).checked == validate([TRAIN]).checked


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({"metric": "tokens_per_sec", "value": 9000 * 8}, 1.0),
        ({"metric": "samples_per_sec", "value": 9000 * 8 / 4096}, 1.0),
        ({"metric": "step_time", "value": 64 * 4096 / 8 / 9, "unit": "ms"}, 1.0),
        ({"metric": "step_time", "value": 64 * 4096 / 8 / 9000 / 60, "unit": "min"}, 1.0),
    ],
)
def test_one_measurement_in_other_words_has_one_error(change: dict[str, object], factor: float) -> None:
    (plain,) = validate([TRAIN]).checked
    (other,) = validate([TRAIN | change]).checked
    assert other.error == pytest.approx(factor * plain.error, rel=1e-6)


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


@pytest.mark.parametrize(
    "change", [{"value": None, "notes": "CUDA out of memory"}, {"value": "OOM"}, {"value": None, "result": "OOMed"}]
)
@pytest.mark.parametrize("kind", ["memory", "train_throughput"])
def test_a_run_that_measured_nothing_else_still_ran_out(kind: str, change: dict[str, object]) -> None:
    report = validate([TRAIN | {"kind": kind, "model": "Qwen3-32B", "unit": "GiB"} | change])
    assert [each.said_to_fit for each in report.ran_out] == [False]
    assert report.unmapped == report.checked == ()


def test_a_gpu_of_less_memory_holds_less() -> None:
    row = TRAIN | {"kind": "memory", "metric": "peak_allocated", "value": 60.0, "unit": "GiB", "notes": "OOM in step 2"}
    verdicts = [
        each.said_to_fit for name in ("A100-80GB", "A100 40GB") for each in validate([row | {"hardware": name}]).ran_out
    ]
    assert verdicts == [True, False]


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


REAL = [
    row
    for name in ("published_numbers", "megatron_h200", "launch_configs")
    for row in load_rows(Path(__file__).parent / "rows" / f"{name}.jsonl")
]
SCALARS = st.sampled_from(
    [
        None,
        0,
        -1,
        1,
        3,
        7,
        0.5,
        1e9,
        1e300,
        10**30,
        True,
        "x",
        "",
        "8",
        "n/a",
        "TP,PP=[,]",
        "B200",
        math.nan,
        math.inf,
        -math.inf,
    ]
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("a"), inner), max_leaves=3)


@st.composite
def altered_rows(draw: st.DrawFn) -> dict[str, object]:
    """A real row with fields dropped, added or altered, some of them inside its mappings."""
    row = dict(draw(st.sampled_from(REAL)))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(row)) | st.sampled_from(["pp", "ep", "cp", "vpp", "etp", "fsdp", "recompute"]))
        inner = row.get(name)
        if draw(st.booleans()):
            row.pop(name, None)
        elif isinstance(inner, dict) and inner:
            row[name] = inner | {draw(st.sampled_from(sorted(inner))): draw(VALUES)}
        else:
            row[name] = draw(VALUES)
    return row


@given(row=altered_rows())
@settings(max_examples=400, deadline=None)
def test_no_row_brings_the_validation_down(row: dict[str, object]) -> None:
    report = validate([row])
    assert report.checked or report.launched or report.unmapped or report.ran_out
    assert all(math.isfinite(each.error) for each in report.checked)
    assert all(each.reason for each in report.unmapped)
    json.dumps(report.to_json(), allow_nan=False)
    assert report.markdown()
