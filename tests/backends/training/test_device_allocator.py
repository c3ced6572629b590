"""On a GPU: a trainer reserves little more than it allocates, and what it lends is native memory; on a CPU nothing is set."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

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


@pytest.fixture
def _native_again() -> Iterator[None]:
    """What tests before have left is given back; those after have the allocator that they began with."""
    torch.cuda.empty_cache()
    yield
    if text := settings(os.environ, expandable=False):
        torch._C._accelerator_setAllocatorSettings(text)


def new_segments(before: list[dict[str, Any]]) -> list[bool]:
    """Of the segments that are there now and were not in the snapshot before: whether each can grow."""
    known = {each["address"] for each in before}
    return [each["is_expandable"] for each in torch.cuda.memory_snapshot() if each["address"] not in known]


def segment_of(tensor: torch.Tensor) -> dict[str, Any]:
    """The segment that a tensor lies in."""
    return max(
        (each for each in torch.cuda.memory_snapshot() if each["address"] <= tensor.data_ptr()), key=lambda at: at["address"]
    )


def more_than_is_free() -> int:
    """Bytes for which no free block suffices: a free one is taken first, whatever its kind."""
    blocks = [block for segment in torch.cuda.memory_snapshot() for block in segment["blocks"]]
    return max((block["size"] for block in blocks if block["state"] == "inactive"), default=0) + 128 * MIB


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("_native_again")
def test_lengths_that_grow_leave_nothing_behind() -> None:
    before = torch.cuda.memory_reserved()
    use_expandable_segments("cuda")
    for size in range(100, 1000, 70):  # the native allocator keeps a segment of each size
        del_soon = torch.empty(size * MIB, dtype=torch.uint8, device="cuda")
        del del_soon
    assert torch.cuda.memory_reserved() - before < 1100 * MIB


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("_native_again")
@pytest.mark.parametrize("left_mib", [0, 300])
def test_what_is_lent_is_native_and_what_comes_after_grows_again(left_mib: int) -> None:
    """Also where a process has used native memory before, of which a free block is left."""
    native = torch.empty(left_mib * MIB, dtype=torch.uint8, device="cuda")
    del native
    use_expandable_segments("cuda")
    grown = torch.empty(more_than_is_free(), dtype=torch.uint8, device="cuda")
    assert segment_of(grown)["is_expandable"]
    size = grown.numel()
    del grown  # a free expandable block of the right size is at hand
    before = torch.cuda.memory_snapshot()
    with native_segments("cuda"):
        lent = torch.empty(size, dtype=torch.uint8, device="cuda")
    assert new_segments(before) == [False]
    assert not segment_of(lent)["is_expandable"]
    after = torch.empty(more_than_is_free(), dtype=torch.uint8, device="cuda")
    assert segment_of(after)["is_expandable"]


BORROWER = """
import base64, pickle, sys, torch
function, arguments = pickle.loads(base64.b64decode(sys.argv[1]))
borrowed = function(*arguments[:6], 0, *arguments[7:])
print(int(borrowed.sum(dtype=torch.int64)))
del borrowed  # which the lender is told
"""


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("_native_again")
def test_another_process_maps_what_is_lent() -> None:
    use_expandable_segments("cuda")
    with native_segments("cuda"):
        lent = torch.full((64 * MIB,), 3, dtype=torch.uint8, device="cuda")
    handle = lend(lent)
    _, arguments = pickle.loads(base64.b64decode(handle))
    assert any(isinstance(each, bytes) and len(each) > 60 for each in arguments), "cudaIpcMemHandle_t has 64 bytes"
    borrower = subprocess.run([sys.executable, "-c", BORROWER, handle], capture_output=True, text=True, check=False)
    assert borrower.stdout.strip() == str(3 * lent.numel()), borrower.stderr
