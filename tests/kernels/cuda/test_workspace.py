"""Zeros for counting kernels: captured launches must not share them."""

from __future__ import annotations

import pytest
import torch

from miles_plan.kernels.cuda import workspace
from miles_plan.kernels.cuda.workspace import _Pool, zeroed_ints


def test_regions_do_not_overlap_and_run_out() -> None:
    pool = _Pool(torch.zeros(100, dtype=torch.int32))
    first, second = pool.cut(5), pool.cut(40)
    assert first is not None
    assert second is not None
    first += 1
    assert int(second.sum()) == 0
    assert second.storage_offset() % 32 == 0
    assert pool.cut(100) is None


def test_the_cpu_gets_fresh_zeros() -> None:
    zeroed_ints(torch.device("cpu"), 3).add_(1)
    assert zeroed_ints(torch.device("cpu"), 3).tolist() == [0, 0, 0]


@pytest.mark.gpu
def test_two_captured_launches_have_their_own_region(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_POOLS", {})
    eager = zeroed_ints(gpu, 64)
    assert zeroed_ints(gpu, 10).data_ptr() == eager.data_ptr(), "one stream, one region"
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        first, second = zeroed_ints(gpu, 64), zeroed_ints(gpu, 64)
        marker = torch.zeros(1, device=gpu)
    pointers = {tensor.data_ptr() for tensor in (eager, first, second)}
    assert len(pointers) == 3
    assert marker.numel() == 1
