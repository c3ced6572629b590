from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from miles_plan.kernels.collectives import RankGroup
from miles_plan.kernels.matmul import exact_product, matmul, prepare_weight, row_parallel_matmul

DTYPES = [torch.float32, torch.bfloat16]


def rows(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((m, k), (n, k), (n,)))
    x[::3] *= 100.0  # rows of very different size must not meet
    return x, w, b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (7, 5), (96, 64), (1000, 33), (4096, 3)])
def test_a_row_alone_equals_the_row_in_a_batch(k: int, n: int, dtype: torch.dtype) -> None:
    x, w, b = rows(37, k, n, dtype)
    whole = matmul(x, w, b)
    assert all(torch.equal(matmul(row[None], w, b)[0], expected) for row, expected in zip(x, whole, strict=True))
    assert torch.equal(matmul(x.flip(0), w, b).flip(0), whole)
    assert torch.equal(torch.cat([matmul(x, part) for part in w.split(2)], dim=1), matmul(x, w))
    assert torch.equal(matmul(x, w, b, prepared=prepare_weight(w)), whole)


def test_the_sum_over_k_is_exact_in_float64() -> None:
    x, w, _ = rows(29, 512, 31, torch.float32)
    x[:, 256:], w[:, 256:] = x[:, :256] * 1.5, -w[:, :256]  # cancellation shows every rounding of a partial sum
    prepared = prepare_weight(w)
    expected = exact_product(x, prepared)
    for seed in range(4):
        order = torch.randperm(512, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(exact_product(x[:, order], prepared[:, order]), expected)
    assert torch.equal(torch.cat([exact_product(row[None], prepared) for row in x]), expected)


def test_threads_do_not_matter() -> None:
    x, w, b = rows(300, 257, 65, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(matmul(x, w, b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_value_against_float64(dtype: torch.dtype, tolerance: float) -> None:
    x, w, b = rows(50, 128, 40, dtype)
    expected = x.double() @ w.double().T + b.double()
    scale = x.double().norm(dim=1, keepdim=True) * w.double().norm(dim=1)
    assert ((matmul(x, w, b).double() - expected).abs() / scale).max().item() < tolerance


def test_gradients_against_float64() -> None:
    x, w, b = (tensor.requires_grad_() for tensor in rows(20, 32, 24, torch.float32))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, w, b)]
    matmul(x.view(4, 5, 32), w, b).square().sum().backward()
    (wide[0] @ wide[1].T + wide[2]).square().sum().backward()
    for own, expected in zip((x, w, b), wide, strict=True):
        assert own.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(own.grad.double(), expected.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_gives_the_bits_of_one(
    size: int, dtype: torch.dtype, run_ranks: Callable[[int, Callable[[RankGroup], Any]], list[Any]]
) -> None:
    k = 96
    x, w, b = rows(17, k, 40, dtype)
    x[:, 50:] *= 1000.0  # one shard holds the row's largest element
    expected = row_parallel_matmul(x, w, b, k_full=k, group=None)
    assert torch.equal(expected, matmul(x, w, b))

    def own_part(group: RankGroup) -> Tensor:
        own = slice(group.rank * k // size, (group.rank + 1) * k // size)
        return row_parallel_matmul(x[:, own], w[:, own], b, k_full=k, group=group)

    for result in run_ranks(size, own_part):
        assert torch.equal(result, expected)


def test_no_rows() -> None:
    assert matmul(torch.zeros(0, 8), torch.ones(3, 8)).shape == (0, 3)


def test_bad_arguments_are_named() -> None:
    x, w, b = rows(2, 4, 3, torch.float32)
    with pytest.raises(ValueError, match=r"weight must have shape \[any, 4\], got \[3, 5\]"):
        matmul(x, torch.ones(3, 5))
    with pytest.raises(ValueError, match="x must be float32 or bfloat16"):
        matmul(x.half(), w)
    with pytest.raises(ValueError, match="bias must have shape"):
        matmul(x, w, torch.ones(4))
    with pytest.raises(ValueError, match="k_full=8"):
        row_parallel_matmul(x, w, b, k_full=8, group=None)
