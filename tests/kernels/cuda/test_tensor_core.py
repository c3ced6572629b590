"""The model of the tensor core's sum: against exact arithmetic here, against the tensor core itself on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.kernels.cuda.fp8_matmul import fp8_matmul, fp8_matmul_reference, quantize_rows, quantize_weight
from miles_plan.kernels.cuda.matmul import matmul, matmul_reference, tree_partial
from miles_plan.kernels.cuda.tensor_core import add_tree, mma_chain, mma_step, mma_tree


def draw(rows: int, k: int, dtype: torch.dtype, seed: int, spread: float = 0.0) -> torch.Tensor:
    """Normal values; `spread` scatters their magnitudes over powers of two, which is where truncation shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    return (x * torch.exp2((torch.rand(rows, k, generator=generator) * 2 - 1) * spread)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_chain_is_close_to_float64(dtype: torch.dtype, error: Callable[..., float]) -> None:
    a, b = draw(7, 96, dtype, 0), draw(5, 96, dtype, 1)
    exact = a.double() @ b.double().T
    assert error(mma_chain(a, b), exact) < 1e-6


def test_a_step_truncates_below_the_largest_addend() -> None:
    """What lies below float32's last bit is cut, where a rounded sum would sometimes carry."""
    a = torch.zeros(1, 16, dtype=torch.bfloat16)
    b = torch.ones(1, 16, dtype=torch.bfloat16)
    a[0, 0] = 1.0
    kept = mma_step(a, b, torch.full((1, 1), 2.0**-23))
    assert kept.item() == 1.0 + 2.0**-23
    assert mma_step(a, b, torch.full((1, 1), 1.75 * 2.0**-23)).item() == 1.0 + 2.0**-23  # to nearest would give 2 * 2^-23
    assert mma_step(a, b, torch.full((1, 1), 2.0**-40)).item() == 1.0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([torch.bfloat16, torch.float16]), st.integers(1, 6))
def test_a_row_does_not_depend_on_its_neighbours(seed: int, dtype: torch.dtype, rows: int) -> None:
    a, b = draw(rows, 64, dtype, seed, 6), draw(9, 64, dtype, seed + 1, 6)
    whole = mma_chain(a, b)
    assert torch.equal(mma_chain(a[-1:], b[2:4]), whole[-1:, 2:4])
    # Which operand is called A cannot show either: the sum is symmetric in them.
    assert torch.equal(mma_chain(b, a).T, whole)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 4, 8]))
def test_ranks_that_own_slices_of_k_add_up_to_the_tree(seed: int, ranks: int) -> None:
    x, weight = draw(3, 256, torch.bfloat16, seed, 4), draw(6, 256, torch.bfloat16, seed + 1, 4)
    width = 256 // ranks
    parts = [
        tree_partial(x[:, r * width : (r + 1) * width].contiguous(), weight[:, r * width : (r + 1) * width].contiguous(), ranks)
        for r in range(ranks)
    ]
    assert torch.equal(add_tree(parts), mma_tree(x, weight, 8))
    assert torch.equal(add_tree(parts).bfloat16(), matmul(x, weight, order="tree"))


def test_chain_and_tree_differ_somewhere() -> None:
    """Otherwise the tests of the tree would prove nothing."""
    x, weight = draw(16, 1024, torch.bfloat16, 0), draw(16, 1024, torch.bfloat16, 1)
    assert not torch.equal(mma_chain(x, weight), mma_tree(x, weight, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("leaves", [0, 8])
def test_the_gpu_computes_the_model_bit_for_bit(gpu: torch.device, dtype: torch.dtype, leaves: int) -> None:
    for seed, spread in ((0, 0.0), (1, 3.0), (2, 10.0)):
        x, weight = draw(33, 384, dtype, seed, spread), draw(48, 384, dtype, seed + 7, spread)
        theirs = matmul_reference(x, weight, leaves)
        order = "tree" if leaves else "chain"
        ours = matmul(x.to(gpu), weight.to(gpu), order=order, out_dtype=torch.float32)  # type: ignore[arg-type]  # a literal
        assert torch.equal(ours.cpu(), theirs), (seed, (ours.cpu() != theirs).float().mean())


@pytest.mark.gpu
def test_the_gpu_computes_the_fp8_model_bit_for_bit(gpu: torch.device) -> None:
    x, weight = draw(33, 384, torch.float32, 3, 2.0), draw(48, 384, torch.float32, 4, 2.0)
    (values, scales), (w, w_scales) = quantize_rows(x), quantize_weight(weight)
    on_gpu = quantize_rows(x.to(gpu))
    assert torch.equal(on_gpu[0].cpu().float(), values.float())
    assert torch.equal(on_gpu[1].cpu(), scales)
    theirs = fp8_matmul_reference(values, scales, w, w_scales)
    ours = fp8_matmul(*(t.to(gpu) for t in (values, scales, w, w_scales)), out_dtype=torch.float32)
    assert torch.equal(ours.cpu(), theirs), (ours.cpu() != theirs).float().mean()
