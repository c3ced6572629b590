from __future__ import annotations

import pytest
import torch

from miles_plan.kernels.moe_combine import moe_combine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_are_added_in_order_whatever_the_batch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(11, 4, 33, generator=generator).to(dtype), torch.rand(11, 4, generator=generator)
    whole = moe_combine(rows, weights)
    expected = torch.zeros(11, 33)
    for slot in range(4):
        expected = expected + rows[:, slot].float() * weights[:, slot, None]
    assert torch.equal(whole, expected.to(dtype))
    assert all(torch.equal(moe_combine(rows[[i]], weights[[i]])[0], whole[i]) for i in range(11))


def test_gradients_against_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(5, 2, 8, generator=generator), torch.rand(5, 2, generator=generator)
    own = [tensor.clone().requires_grad_() for tensor in (rows, weights)]
    reference = [tensor.clone().requires_grad_() for tensor in (rows, weights)]
    moe_combine(own[0], own[1]).square().sum().backward()
    (reference[0] * reference[1][..., None]).sum(dim=1).square().sum().backward()
    for tensor, expected in zip(own, reference, strict=True):
        torch.testing.assert_close(tensor.grad, expected.grad)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"weights must have shape \[2, 3\]"):
        moe_combine(torch.ones(2, 3, 4), torch.ones(2, 4))
