from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from miles_plan.kernels.collectives import RankGroup
from miles_plan.kernels.grouped_matmul import grouped_matmul
from miles_plan.kernels.matmul import matmul

COUNTS = [3, 0, 10, 1]


def inputs(dtype: torch.dtype, k: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(14, k, generator=generator).to(dtype), torch.randn(4, 20, k, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_expert_computes_as_matmul_does(dtype: torch.dtype) -> None:
    x, w = inputs(dtype)
    expected = torch.cat([matmul(part, w[expert]) for expert, part in enumerate(x.split(COUNTS))])
    assert torch.equal(grouped_matmul(x, w, COUNTS), expected)


def test_gradients_are_those_of_matmul() -> None:
    x, w = (tensor.requires_grad_() for tensor in inputs(torch.float32))
    y, v = (tensor.detach().clone().requires_grad_() for tensor in (x, w))
    grouped_matmul(x, w, COUNTS).square().sum().backward()
    torch.cat([matmul(part, v[expert]) for expert, part in enumerate(y.split(COUNTS))]).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(w.grad, v.grad)
    assert w.grad is not None
    assert not w.grad[1].any()


def test_sharded_k_gives_the_bits_of_one_rank(
    run_ranks: Callable[[int, Callable[[RankGroup], Any]], list[Any]],
) -> None:
    x, w = inputs(torch.float32)
    expected = grouped_matmul(x, w, COUNTS)

    def own_part(group: RankGroup) -> Tensor:
        own = slice(group.rank * 24, (group.rank + 1) * 24)
        return grouped_matmul(x[:, own], w[:, :, own], COUNTS, k_full=48, group=group)

    assert all(torch.equal(result, expected) for result in run_ranks(2, own_part))


def test_no_rows_at_all() -> None:
    _, w = inputs(torch.float32)
    assert grouped_matmul(torch.zeros(0, 48), w, [0, 0, 0, 0]).shape == (0, 20)


def test_counts_that_do_not_fit() -> None:
    x, w = inputs(torch.float32)
    with pytest.raises(ValueError, match="rows_per_expert must give 4 counts that add up to 14 rows, got 3 adding up to 14"):
        grouped_matmul(x, w, [4, 5, 5])
    with pytest.raises(ValueError, match="adding up to 13"):
        grouped_matmul(x, w, [3, 0, 10, 0])
