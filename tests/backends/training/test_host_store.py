from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from miles_plan.backends.engine import EngineError
from miles_plan.backends.training.host_store import HostStore


def test_a_round_trip_keeps_every_bit_and_frees_memory_meanwhile(tmp_path: Path) -> None:
    whole = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    view, half = whole.T[1:3], torch.randn(9, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole[0, 0] = float("nan")
    before = whole.clone()
    half_before = half.clone()
    store = HostStore(tmp_path / "parked")
    store.offload("weights", [whole, view, half])
    assert whole.untyped_storage().nbytes() == half.untyped_storage().nbytes() == 0
    assert store.host_bytes == {"weights": 7 * 5 * 4 + 9 * 2}
    assert store.is_parked("weights")
    store.offload("weights", [whole])  # a no-op: it is parked already
    store.onload("weights")
    assert torch.equal(whole.view(torch.int32), before.view(torch.int32))
    assert torch.equal(view.view(torch.int32), before.T[1:3].view(torch.int32))
    assert torch.equal(half, half_before)
    assert store.host_bytes == {}
    assert list((tmp_path / "parked").iterdir()) == []
    store.onload("weights")  # a no-op: it is resident


def test_resident_memory_really_falls(tmp_path: Path) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 64 * 2**20
    tensor = torch.ones(size // 4)
    store = HostStore(tmp_path)
    held = resident_bytes()
    store.offload("optimizer", [tensor])
    assert resident_bytes() < held - size // 2
    store.onload("optimizer")
    assert resident_bytes() > held - size // 2
    assert bool((tensor == 1).all())


def test_empty_parts_and_closing(tmp_path: Path) -> None:
    store = HostStore(tmp_path / "parked")
    store.offload("gradients", [])
    store.onload("gradients")
    store.offload("weights", [torch.ones(3)])
    store.close()
    assert not (tmp_path / "parked").exists()


def test_a_place_that_cannot_be_written_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    tensor = torch.ones(3)
    with pytest.raises(EngineError, match=r"cannot park 12 bytes of 'weights' in .*weights\.bin"):
        HostStore(tmp_path / "file").offload("weights", [tensor])
    assert tensor.sum() == 3


def test_a_parked_file_that_vanished_is_named(tmp_path: Path) -> None:
    store = HostStore(tmp_path)
    store.offload("weights", [torch.ones(3)])
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(EngineError, match="cannot read back"):
        store.onload("weights")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_parts_wait_in_pinned_memory_of_their_own_size(tmp_path: Path) -> None:
    store = HostStore(tmp_path / "parked")
    kept = torch.randn(3, 1000, device="cuda")
    before = kept.clone()
    for rows in (3, 2, 5):  # as large, smaller, larger than what is held
        tensor = torch.randn(rows, 1000, device="cuda") if rows != 3 else kept
        want = tensor.clone()
        store.offload("optimizer", [tensor])
        assert tensor.untyped_storage().nbytes() == 0
        assert store._pinned["optimizer"].tensor.is_pinned()
        store.onload("optimizer")
        assert torch.equal(tensor, want)
    assert torch.equal(kept, before)
    assert store._pinned["optimizer"].size_bytes == 5 * 1000 * 4
    store.offload("gradients", [torch.empty(0, device="cuda")])
    store.onload("gradients")
    store.close()
    assert not (tmp_path / "parked").exists()
