"""On a GPU: a trainer reserves little more than it allocates, and what it lends is native memory; on a CPU nothing is set."""

from __future__ import annotations

import base64
import pickle

import pytest
import torch

from miles_plan.backends.training.device_allocator import native_segments, settings, use_expandable_segments
from miles_plan.backends.weight_transport.cuda_ipc import lend

MIB = 1 << 20
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_a_cpu_the_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    use_expandable_segments("cpu")
    with native_segments("cpu"):
        pass


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512,expandable_segments:True"),
        (
            {"PYTORCH_ALLOC_CONF": "expandable_segments:True, max_split_size_mb:64"},
            "max_split_size_mb:64,expandable_segments:True",
        ),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, None),
    ],
)
def test_what_the_environment_asks_of_the_allocator_stays(given: dict[str, str], expected: str | None) -> None:
    assert settings(given, expandable=True) == expected
    assert settings(given, expandable=False) == (expected and expected.replace("segments:True", "segments:False"))


@pytest.mark.gpu
@needs_gpu
def test_lengths_that_grow_leave_nothing_behind() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    use_expandable_segments("cuda")
    for size in range(100, 1000, 70):  # the native allocator keeps a segment of each size
        del_soon = torch.empty(size * MIB, dtype=torch.uint8, device="cuda")
        del del_soon
    assert torch.cuda.memory_reserved() - before < 1100 * MIB


@pytest.mark.gpu
@needs_gpu
def test_what_is_lent_is_native_and_what_comes_after_grows_again() -> None:
    use_expandable_segments("cuda")
    grown = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    del grown  # a free expandable block of the right size is at hand
    with native_segments("cuda"):
        lent = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    _, arguments = pickle.loads(base64.b64decode(lend(lent)))
    handles = [each for each in arguments if isinstance(each, bytes) and len(each) > 60]
    assert handles, "cudaIpcMemHandle_t has 64 bytes"
    segments = {each["address"]: each["is_expandable"] for each in torch.cuda.memory_snapshot()}
    assert not segments[max(at for at in segments if at <= lent.data_ptr())]
    after = torch.empty(128 * MIB, dtype=torch.uint8, device="cuda")
    segments = {each["address"]: each["is_expandable"] for each in torch.cuda.memory_snapshot()}
    assert segments[max(at for at in segments if at <= after.data_ptr())]
