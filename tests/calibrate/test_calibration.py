"""From points to a file that estimates read, and what stops it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miles_plan.calibrate.calibration import calibrate_machine, fitted
from miles_plan.calibrate.points import Machine
from miles_plan.catalog.gpus import find_gpu
from miles_plan.cost.profile import load_profile
from miles_plan.diagnostics import PlanError
from tests.calibrate.test_fit import points

MACHINE = Machine(device="NVIDIA H200", num_gpus=1, memory_bytes=150 * 10**9, processor="a CPU", versions={"torch": "2.13"})


def test_the_file_is_a_profile_with_its_evidence(tmp_path: Path) -> None:
    found = fitted(find_gpu("h200"), MACHINE, points())
    path = tmp_path / "mine.json"
    path.write_text(found.text)
    read = load_profile(path, find_gpu("h200"))
    assert read.hbm_fraction == found.constants["hbm_fraction"]
    assert read.gemm_fraction["bf16"] == found.constants["gemm_fraction"]["bf16"]
    data = json.loads(found.text)
    assert data["machine"]["versions"] == {"torch": "2.13"}
    assert len(data["points"]["gemms"]) == len(points().gemms)
    assert "1x NVIDIA H200" in data["source"]


def test_every_constant_stands_beside_the_shipped_one() -> None:
    found = {each.name: each for each in fitted(find_gpu("h200"), MACHINE, points()).comparisons()}
    assert found["gemm_fraction.bf16"].shipped is not None
    assert found["decode_ops.attention.floor_s"].measured == pytest.approx(1.1e-5, rel=1e-2)


def test_every_measurement_that_cannot_be_right_is_named() -> None:
    wrong = replace(
        points(),
        gemms=tuple(replace(each, spread=0.9) for each in points().gemms),
        streams=tuple(replace(each, seconds=1e-9) for each in points().streams),
    )
    with pytest.raises(PlanError) as refused:
        fitted(find_gpu("h200"), MACHINE, wrong)
    assert {each.code for each in refused.value.diagnostics} == {"MP452"}
    assert len(refused.value.diagnostics) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_what_to_do() -> None:
    with pytest.raises(PlanError) as refused:
        calibrate_machine(5.0, lambda part: None)
    (found,) = refused.value.diagnostics
    assert found.code == "MP450"
    assert "--profile" in found.help


def test_a_gpu_that_the_catalog_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    other = replace(MACHINE, device="NVIDIA L40S", memory_bytes=48 * 10**9)
    monkeypatch.setattr("miles_plan.calibrate.calibration.machine_of", lambda device: other)
    with pytest.raises(PlanError) as refused:
        calibrate_machine(5.0, lambda part: None)
    assert refused.value.diagnostics[0].code == "MP451"
    assert "NVIDIA L40S" in refused.value.diagnostics[0].message


def test_a_gpu_that_is_full_is_no_bug_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 140 << 30))
    monkeypatch.setattr("miles_plan.calibrate.calibration.machine_of", lambda device: MACHINE)
    monkeypatch.setattr("miles_plan.calibrate.calibration.measure", full)
    with pytest.raises(PlanError) as refused:
        calibrate_machine(5.0, lambda part: None)
    assert refused.value.diagnostics[0].code == "MP452"
    assert "1.0 GiB of 140.0 GiB are free" in refused.value.diagnostics[0].message
