"""The measurements themselves, run for real with small sizes: on the CPU here, on GPUs where there are any."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from miles_plan.calibrate.collectives import OPS, CollectivesFailedError, measure_collectives
from miles_plan.calibrate.measure import machine_of, measure
from miles_plan.calibrate.points import Measurements
from miles_plan.calibrate.timing import ROTATED_BYTES, rotations, time_calls
from tests.calibrate.small_grid import SMALL

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found() -> Measurements:
    return measure(CPU, 0.2, SMALL, lambda part: None)


def every_point(found: Measurements) -> Iterator[dict[str, object]]:
    for points in found.to_json().values():
        yield from points


def test_every_kind_of_point_is_measured(found: Measurements) -> None:
    assert {each.kernel for each in found.streams} == {"copy", "scale", "add"}
    assert {each.direction for each in found.host_copies} == {"host_to_device", "device_to_host"}
    assert [each.state for each in found.gemms] == ["burst", "sustained", "sustained", "decode", "decode", "decode"]
    assert len(found.grouped_gemms) == 1
    assert [each.phase for each in found.attention] == ["forward", "backward", "decode", "decode"]
    assert {each.way for each in found.launches} == {"eager_host", "graph_kernel", "graph_product"}


def test_every_figure_is_positive_and_survives_json(found: Measurements) -> None:
    points = list(every_point(found))
    assert all(point["seconds"] > 0 for point in points)  # type: ignore[operator]
    assert json.loads(json.dumps(points)) == points


def test_one_device_has_no_collectives_and_a_cpu_no_context(found: Measurements) -> None:
    assert found.collectives == ()
    assert found.memory == ()


def test_parts_are_told_as_they_start() -> None:
    told: list[str] = []
    measure(CPU, 0.05, SMALL, told.append)
    assert told[0] == "memory of a CUDA context"
    assert told[-1] == "collectives: left out, one GPU is visible"


def test_collectives_run_between_processes() -> None:
    points, memory = measure_collectives("cpu", 2, SMALL.collective_bytes, 0.1)
    assert [(each.op, each.size_bytes) for each in points] == [(op, size) for size in SMALL.collective_bytes for op in OPS]
    assert all(each.ranks == 2 and each.seconds > 0 for each in points)
    assert memory == ()


def test_a_process_that_fails_is_heard_of() -> None:
    with pytest.raises(CollectivesFailedError, match="rank"):
        measure_collectives("no such device", 1, (1 << 16,), 0.1)


def test_inputs_rotate_past_the_cache() -> None:
    assert rotations(1 << 30) == 2
    assert rotations(ROTATED_BYTES // 8) == 8
    assert rotations(1) == 64


def test_a_longer_call_takes_longer() -> None:
    small, large = torch.randn(64, 64), torch.randn(512, 512)
    quick = time_calls([lambda: small @ small], CPU, 0.02)
    slow = time_calls([lambda: large @ large], CPU, 0.02)
    assert slow.seconds > quick.seconds
    assert slow.spread >= 0


def test_the_machine_is_described() -> None:
    machine = machine_of(CPU)
    assert machine.device == "cpu"
    assert machine.versions["torch"] == torch.__version__
    assert machine.processor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_every_kind_of_point() -> None:
    found = measure(torch.device("cuda", 0), 1.0, SMALL, lambda part: None)
    assert {each.direction for each in found.host_copies} == {"pin", "host_to_device", "device_to_host"}
    assert found.memory[0].what == "context"
    assert 1e8 < found.memory[0].size_bytes < 4e9
    assert all(each.backend in ("cudnn", "flash", "efficient") for each in found.attention)
    kernel = next(each.seconds for each in found.launches if each.way == "graph_kernel")
    assert kernel < next(each.seconds for each in found.launches if each.way == "eager_host")
    if torch.cuda.get_device_capability() >= (8, 9):
        assert {each.precision for each in found.gemms} == {"bf16", "fp8"}


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs several GPUs")
def test_collectives_of_gpus_take_memory_and_time() -> None:
    points, memory = measure_collectives("cuda", 2, (1 << 20, 1 << 26), 0.5)
    assert {each.op for each in points} == set(OPS)
    assert [each.what for each in memory] == ["communicator", "next_communicator"]
    assert memory[0].size_bytes > 1e7
