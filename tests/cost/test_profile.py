"""Profile files: the shipped ones, a user's part of one over them, and what makes a file unusable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miles_plan.catalog.gpus import cluster_of, find_gpu, gpu_names
from miles_plan.catalog.models import find_model
from miles_plan.cost.decode_time import DECODE_ERROR, decode_time_per_token
from miles_plan.cost.profile import (
    load_profile,
    measured_profile_text,
    profile_for,
    relative_error,
    save_profile,
    shipped_constants,
)
from miles_plan.cost.train_time import STEP_ERROR, train_step_time, workload_of_lengths
from miles_plan.ir.layout import RolloutLayout, TrainLayout

DENSE = ("gemm_fraction", "attention_forward_fraction", "attention_backward_fraction", "hbm_fraction")


def write(path: Path, gpu: str = "h200", **constants: Any) -> Path:
    path.write_text(json.dumps({"schema": 1, "gpu": gpu, "date": "2026-11-21", **constants}))
    return path


@pytest.mark.parametrize("name", gpu_names())
def test_every_gpu_has_a_profile(name: str) -> None:
    assert profile_for(find_gpu(name)).here is None


def test_what_a_file_leaves_out_is_as_shipped(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json", gemm_fraction={"bf16": 0.5}, decode_ops={"attention": {"floor_s": 1e-6}})
    found, shipped = load_profile(path), profile_for(find_gpu("h200"))
    assert found.gemm_fraction == {**shipped.gemm_fraction, "bf16": 0.5}
    assert found.decode_ops["attention"] == replace(shipped.decode_ops["attention"], floor_s=1e-6)
    assert found.hbm_fraction == shipped.hbm_fraction
    assert found.basis == "measured"


def test_the_file_says_what_it_measured(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json", gemm_fraction={"bf16": 0.5}, hbm_fraction=0.8)
    here = load_profile(path).here
    assert here is not None
    assert here.constants == ("gemm_fraction.bf16", "hbm_fraction")
    assert here.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert here.covers(["gemm_fraction", "hbm_fraction"])
    assert not here.covers(["gemm_fraction", "scan_fraction"])
    rest = shipped_constants(load_profile(path))
    assert "gemm_fraction.fp8" in rest
    assert "gemm_fraction.bf16" not in rest


def test_a_whole_profile_survives_its_file(tmp_path: Path) -> None:
    shipped = profile_for(find_gpu("b200"))
    save_profile(shipped, tmp_path / "b200.json")
    read = load_profile(tmp_path / "b200.json")
    assert replace(read, here=None, basis=shipped.basis) == shipped
    assert shipped_constants(read) == ()


def test_points_and_machine_are_kept_one_a_line(tmp_path: Path) -> None:
    points = {"streams": [{"kernel": "copy", "seconds": 1e-3}, {"kernel": "add", "seconds": 2e-3}]}
    text = measured_profile_text(find_gpu("h200"), "2026-11-21", "me", {"hbm_fraction": 0.8}, {"device": "H200"}, points)
    assert json.loads(text)["points"] == points
    assert '   {"kernel": "add", "seconds": 0.002}\n' in text
    (tmp_path / "mine.json").write_text(text)
    assert load_profile(tmp_path / "mine.json").hbm_fraction == 0.8


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("not json", "is not JSON"),
        ("[1]", "not a hardware profile of schema 1"),
        ('{"schema": 2, "gpu": "h200"}', "not a hardware profile of schema 1"),
        ('{"schema": 1, "gpu": "h200"}', "holds no constant"),
        ('{"schema": 1, "gpu": "h2000", "hbm_fraction": 0.8}', "no GPU called 'h2000'"),
        ('{"schema": 1, "gpu": "h200", "hbm_fracton": 0.8}', "has no hbm_fracton"),
        ('{"schema": 1, "gpu": "h200", "hbm_fraction": "0.8"}', "must be a number"),
        ('{"schema": 1, "gpu": "h200", "hbm_fraction": true}', "must be a number"),
        ('{"schema": 1, "gpu": "h200", "hbm_fraction": NaN}', "must be a number"),
        ('{"schema": 1, "gpu": "h200", "hbm_fraction": -0.1}', "must be a number of at least 0"),
        ('{"schema": 1, "gpu": "h200", "hbm_fraction": 0}', "must be above 0"),
        ('{"schema": 1, "gpu": "h200", "hbm_fraction": 85}', "is a fraction"),
        ('{"schema": 1, "gpu": "h200", "gemm_fraction": 0.7}', "must be a mapping"),
        ('{"schema": 1, "gpu": "h200", "gemm_fraction": {"fp7": 0.7}}', "gemm_fraction has no fp7"),
        ('{"schema": 1, "gpu": "h200", "decode_ops": {"attention": {"floor": 1}}}', "decode_ops.attention has no floor"),
    ],
)
def test_a_file_that_no_machine_gives_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=why):
        load_profile(tmp_path / "bad.json")


def test_a_profile_of_another_gpu_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "b200.json", gpu="b200", hbm_fraction=0.8)
    with pytest.raises(ValueError, match="is a profile of b200, the cluster has h200"):
        load_profile(path, find_gpu("h200"))


def measured(tmp_path: Path, gpu: str, *names: str, change: Callable[[Any], Any] = lambda value: value) -> Any:
    """The GPU with these constants measured, at the shipped values unless changed."""
    shipped = profile_for(find_gpu(gpu))
    path = tmp_path / f"{gpu}.json"
    constants: dict[str, Any] = {}
    for name in names:
        value = getattr(shipped, name)
        constants[name] = {k: change(v) for k, v in value.items()} if isinstance(value, dict) else change(value)
    return replace(find_gpu(gpu), profile=load_profile(write(path, gpu, **constants), find_gpu(gpu)))


def step(gpu: Any, gpus: int = 1) -> Any:
    layout = TrainLayout(dp=gpus)
    workload = workload_of_lengths([4096.0] * 64, tokens_per_gpu=16384)
    return train_step_time(find_model("qwen3-8b"), layout, workload, cluster_of(gpu, 1, gpus))


def test_half_the_products_rate_doubles_the_products_time(tmp_path: Path) -> None:
    whole = step(measured(tmp_path, "h200", "gemm_fraction"))
    half = step(measured(tmp_path, "h200", "gemm_fraction", change=lambda value: value / 2))
    assert half.term("gemm") == pytest.approx(2 * whole.term("gemm"), rel=0.02)
    assert half.mid > 1.5 * whole.mid
    assert half.term("attention") == whole.term("attention")


def test_decoding_follows_its_kernels(tmp_path: Path) -> None:
    model, layout = find_model("qwen3-8b"), RolloutLayout(engines=1, tp=1)
    gpu = find_gpu("h200")
    ops = {"product_bf16": {"floor_s": 4e-6, "hbm_fraction": profile_for(gpu).decode_ops["product_bf16"].hbm_fraction / 2}}
    slow = replace(gpu, profile=load_profile(write(tmp_path / "slow.json", decode_ops=ops)))
    before, after = (decode_time_per_token(model, layout, 8, 1000, each) for each in (gpu, slow))
    assert after.term("products") > 1.8 * before.term("products")
    assert after.term("attention") == before.term("attention")


def test_measuring_a_borrowed_profile_narrows_the_interval(tmp_path: Path) -> None:
    borrowed = step(find_gpu("h20"))
    assert borrowed.basis == "roofline"
    assert borrowed.high / borrowed.mid == pytest.approx(1 + STEP_ERROR["roofline"])
    own = step(measured(tmp_path, "h20", *DENSE))
    assert own.basis == "measured"
    assert own.high / own.mid == pytest.approx(1 + STEP_ERROR["measured"])
    assert own.mid == pytest.approx(borrowed.mid, rel=1e-6)


def test_a_part_that_was_not_measured_keeps_the_interval(tmp_path: Path) -> None:
    one_gpu = measured(tmp_path, "h20", *DENSE)
    assert step(one_gpu, gpus=8).high / step(one_gpu, gpus=8).mid == pytest.approx(1 + STEP_ERROR["roofline"])
    some = step(measured(tmp_path, "h20", "gemm_fraction"))
    assert some.basis == "roofline"
    linked = measured(tmp_path, "h20", *DENSE, "nvlink_bus_fraction")
    assert step(linked, gpus=8).basis == "measured"


def test_measuring_never_widens(tmp_path: Path) -> None:
    own = measured(tmp_path, "b200", *DENSE)
    shipped = profile_for(find_gpu("b200"))
    for errors in (STEP_ERROR, DECODE_ERROR):
        assert relative_error(errors, own.profile, DENSE) <= relative_error(errors, shipped, DENSE)
