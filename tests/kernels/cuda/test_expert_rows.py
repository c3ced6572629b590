"""Tokens handed to their experts and their gradients added in slot order."""

from __future__ import annotations

import pytest
import torch

from miles_plan.kernels.cuda.expert_rows import expert_order, expert_rows
from miles_plan.kernels.cuda.moe_combine import moe_combine


def test_rows_are_sorted_by_expert_and_come_back() -> None:
    ids = torch.tensor([[2, 0], [1, 2], [2, 3]])
    order = expert_order(ids, 5)
    assert order.counts.tolist() == [1, 1, 3, 1, 0]
    assert order.token.tolist() == [0, 1, 0, 1, 2, 2]
    x = torch.randn(3, 8).bfloat16()
    rows = expert_rows(x, order)
    assert torch.equal(rows[order.place[1, 1]], x[1])
    halves = torch.full((3, 2), 0.5)
    assert torch.equal(moe_combine(rows, order.place, halves), x)


def test_a_tokens_gradient_adds_its_slots_in_order() -> None:
    order = expert_order(torch.tensor([[3, 1, 0], [0, 2, 3]], dtype=torch.int32), 4)
    x = torch.randn(2, 8).bfloat16().requires_grad_()
    grad = torch.randn(6, 8).bfloat16()
    expert_rows(x, order).backward(grad)  # type: ignore[no-untyped-call]  # torch's backward is untyped
    for token in range(2):
        total = torch.zeros(8)
        for slot in range(3):
            total = total + grad[order.place[token, slot]].float()
        assert x.grad is not None
        assert torch.equal(x.grad[token], total.bfloat16())


def test_wrong_ids_are_named() -> None:
    with pytest.raises(ValueError, match=r"^ids has dtype float32; allowed: int32, int64"):
        expert_order(torch.zeros(2, 2), 4)
    with pytest.raises(ValueError, match=r"^x has shape \[2, 2, 2\]; allowed: 2 dimensions"):
        expert_rows(torch.zeros(2, 2, 2), expert_order(torch.zeros(2, 1, dtype=torch.int64), 1))
