"""Watching a GPU, where there is one; where there is none, nothing is watched and looking says so."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from miles_plan.backends.executor.actors import Actor
from miles_plan.backends.executor.device_memory import SAMPLE_S, DeviceMemoryError, device_memory, visible_gpus, watched

DRIVER = Path("/proc/driver/nvidia").exists()


@pytest.mark.parametrize(("named", "gpus"), [("0,1", ["0", "1"]), ("", []), ("GPU-abc", ["GPU-abc"]), (" 2 ,", ["2"])])
def test_visible_gpus_are_those_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, named: str, gpus: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == gpus


@pytest.mark.skipif(DRIVER, reason="an NVIDIA driver is here")
def test_without_a_driver_there_are_no_gpus_and_looking_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == []
    with pytest.raises(DeviceMemoryError, match="no NVIDIA driver"):
        device_memory("0")


@pytest.mark.gpu
@pytest.mark.skipif(not DRIVER, reason="no NVIDIA driver is here")
def test_what_a_tensor_takes_is_seen_while_it_lives() -> None:
    import torch

    gpu = visible_gpus()[0]
    torch.zeros(1, device="cuda")
    before = device_memory(gpu).used_bytes
    with watched(gpu) as peak:
        held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        time.sleep(10 * SAMPLE_S)
        del held
        torch.cuda.empty_cache()
    assert peak.used_bytes - before >= 1 << 30
    assert device_memory(gpu).used_bytes - before < 1 << 28


def test_an_actor_without_a_gpu_reports_no_peak() -> None:
    with watched(None) as peak:
        pass
    assert peak.used_bytes == 0
    actor = Actor("host", 1)
    actor.slots["x"] = 2
    timed = actor.apply("x", lambda held, more: held + more, 3)
    assert (timed.report, timed.peak_bytes) == (5, 0)


def test_a_pair_of_slots_reaches_the_function_together() -> None:
    actor = Actor("gpu-0", 1)
    actor.slots |= {"train": "t", "rollout": "r"}
    assert actor.apply_pair("train", "rollout", lambda one, other, more: one + str(other) + more, "!").report == "tr!"
    del actor.slots["rollout"]
    assert actor.apply_pair("train", "rollout", lambda one, other: (one, other)).report == ("t", None)
