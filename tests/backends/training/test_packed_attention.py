"""Packed causal attention: sequences do not see each other, windows are as transformers means them, a GPU gives the same."""

from __future__ import annotations

import itertools

import pytest
import torch

from miles_plan.backends.training.packed_attention import attention_of_each, flash_takes, packed_causal_attention

LENGTHS = [5, 1, 130, 17, 64, 300]
BOUNDS = list(itertools.accumulate(LENGTHS, initial=0))


def inputs(dtype: torch.dtype, device: str, *, heads: int = 4, groups: int = 2, width: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BOUNDS[-1], count, width) for count in (heads, groups, groups, heads)]
    made = [torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for shape in shapes]
    return [each.requires_grad_() for each in made[:3]] + made[3:]


def run(function, tensors: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """What the function gives, and the gradients."""
    query, key, value, gradient = tensors
    out = function(query, key, value, BOUNDS, scale=0.3, **options)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), gradient)]


def by_definition(query, key, value, bounds, *, scale, window=None):
    """All scores at once, in float64, those of other sequences, later and too early keys struck out."""
    repeat = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(repeat, 1), value.double().repeat_interleave(repeat, 1)
    owner = torch.repeat_interleave(torch.tensor(LENGTHS)).to(query.device)
    place = torch.arange(len(owner), device=query.device)
    back = place[:, None] - place[None]
    seen = (owner[:, None] == owner[None]) & (back >= 0) & (back < (window or len(owner)))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(query.dtype)


def same_bits(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.fixture
def _on_gpu() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs an NVIDIA GPU that FlashAttention runs on")


@pytest.mark.parametrize("window", [None, 1, 7, 100, 5000])
def test_sequences_see_themselves_and_windows(window):
    tensors = inputs(torch.float32, "cpu")
    ours, theirs = (run(function, tensors, window=window) for function in (packed_causal_attention, by_definition))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_a_window_as_long_as_every_sequence_changes_no_bit():
    tensors = inputs(torch.float32, "cpu")
    assert same_bits(run(packed_causal_attention, tensors, window=300), run(packed_causal_attention, tensors))


def test_a_cpu_takes_sequences_one_by_one():
    query, key, value, _ = inputs(torch.bfloat16, "cpu")
    assert not flash_takes(query, key, value)


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups", "width"), [(16, 8, 128), (4, 4, 64), (6, 2, 20), (8, 1, 256)])
@pytest.mark.parametrize("window", [None, 7, 100, 5000])
def test_one_call_is_as_near_the_truth_as_a_call_a_sequence(dtype, heads, groups, width, window):
    tensors = inputs(dtype, "cuda", heads=heads, groups=groups, width=width)
    assert flash_takes(*tensors[:3])
    exact = [each.detach().double().requires_grad_(number < 3) for number, each in enumerate(tensors)]
    found, looped, truth = (
        run(function, given, window=window)
        for function, given in ((packed_causal_attention, tensors), (attention_of_each, tensors), (by_definition, exact))
    )
    for ours, theirs, true in zip(found, looped, truth, strict=True):
        assert ours.dtype == dtype
        error, usual = (float((each.double() - true).abs().max()) for each in (ours, theirs))
        assert error < 2.0 * usual + 4e-3 * float(true.abs().max())


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_gpu")
def test_gradients_have_the_same_bits_every_time():
    tensors = inputs(torch.bfloat16, "cuda", heads=16, groups=8, width=128)
    first = run(packed_causal_attention, tensors)
    assert all(same_bits(first, run(packed_causal_attention, tensors)) for _ in range(5))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_gpu")
def test_offsets_on_the_device_change_nothing():
    tensors = inputs(torch.bfloat16, "cuda")
    offsets = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    assert same_bits(run(packed_causal_attention, tensors, offsets=offsets), run(packed_causal_attention, tensors))


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_gpu")
def test_float32_and_wide_heads_go_one_by_one():
    assert not flash_takes(*inputs(torch.float32, "cuda")[:3])
    assert not flash_takes(*inputs(torch.bfloat16, "cuda", width=264)[:3])
