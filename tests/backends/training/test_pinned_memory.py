from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from miles_plan.backends.engine import EngineError
from miles_plan.backends.training import pinned_memory
from miles_plan.backends.training.pinned_memory import PinnedMemory, touched_memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("size", [1, 4097, (64 << 20) + 5])
def test_every_page_exists_and_is_zero(size: int) -> None:
    before = resident_bytes()
    tensor = touched_memory(size)
    assert resident_bytes() - before >= size - (1 << 20)  # of small ones other memory of the process shows, too
    assert tensor.shape == (size,)
    assert not tensor.any()


def test_what_the_driver_refuses_is_an_error_that_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(pinned_memory.torch.cuda, "cudart", lambda: refusing)
    with pytest.raises(EngineError, match="cannot lock 100 bytes of host memory: CUDA error 2"):
        PinnedMemory(100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_is_pinned_and_of_the_size_asked_for() -> None:
    memory = PinnedMemory(3 << 20)
    assert memory.tensor.is_pinned()
    there = torch.randint(0, 255, (3 << 20,), dtype=torch.uint8, device="cuda")
    memory.tensor.copy_(there)
    assert torch.equal(memory.tensor, there.cpu())
    memory.close()
    assert memory.tensor.numel() == 0
