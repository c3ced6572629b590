from __future__ import annotations

import pytest
import torch

from miles_plan.kernels.router import choose_experts, count_mismatches, gate_weights


def test_ties_go_to_the_lower_index() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert choose_experts(logits, 2).tolist() == [[1, 2], [0, 1]]
    assert choose_experts(torch.zeros(3, 1000), 8).tolist() == [list(range(8))] * 3


@pytest.mark.parametrize("normalise", [True, False])
def test_value_and_gradients_against_torch(normalise: bool) -> None:
    logits = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    experts = choose_experts(logits, 4)
    weights = gate_weights(logits, experts, normalise=normalise)
    expected = torch.softmax(wide, dim=-1).gather(1, experts)
    if normalise:
        expected = expected / expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-7)
    weights.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_row_alone_equals_the_row_in_a_batch(normalise: bool) -> None:
    logits = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)) * 5
    experts = choose_experts(logits, 4)
    whole = gate_weights(logits, experts, normalise=normalise)
    for row in range(30):
        assert torch.equal(choose_experts(logits[[row]], 4)[0], experts[row])
        assert torch.equal(gate_weights(logits[[row]], experts[[row]], normalise=normalise)[0], whole[row])


def test_replayed_experts_are_weighed_even_when_unlikely() -> None:
    logits = torch.tensor([[0.0, -500.0, -501.0]])
    weights = gate_weights(logits, torch.tensor([[1, 2]]), normalise=True)
    torch.testing.assert_close(weights, torch.tensor([[0.731059, 0.268941]]))


def test_mismatches_ignore_the_order_of_slots() -> None:
    chosen = torch.tensor([[0, 1], [2, 3], [4, 5]])
    assert count_mismatches(chosen, torch.tensor([[1, 0], [2, 3], [4, 6]])) == 1


def test_bad_arguments_are_named() -> None:
    logits = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"top_k must lie in \[1, 4\], got 5"):
        choose_experts(logits, 5)
    with pytest.raises(ValueError, match="experts must be int64"):
        gate_weights(logits, torch.zeros(2, 1, dtype=torch.int32), normalise=True)
    with pytest.raises(ValueError, match="logits must be float32"):
        choose_experts(logits.double(), 1)
