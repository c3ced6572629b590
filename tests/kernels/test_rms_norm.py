from __future__ import annotations

import pytest
import torch

from miles_plan.kernels.rms_norm import _inverse_rms, rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [1, 7, 96, 4096])
def test_a_row_alone_equals_the_row_in_a_batch(hidden: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(33, hidden, generator=generator) * torch.logspace(-5, 5, 33)[:, None]).to(dtype)
    weight = torch.randn(hidden, generator=generator).to(dtype)
    whole = rms_norm(x, weight, epsilon=1e-6)
    assert all(torch.equal(rms_norm(row, weight, epsilon=1e-6), out) for row, out in zip(x, whole, strict=True))
    strided = torch.stack([x, x], dim=1)[:, 1]
    assert torch.equal(rms_norm(strided, weight, epsilon=1e-6), whole)


def test_the_sum_of_squares_is_exact_in_float64() -> None:
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    expected = _inverse_rms(x, 1e-6)
    for seed in range(4):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(_inverse_rms(x[:, order], 1e-6), expected)


def test_value_and_gradients_against_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 64, generator=generator), torch.randn(64, generator=generator)
    own = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    wide = [tensor.double().requires_grad_() for tensor in (x, weight)]
    out = rms_norm(own[0], own[1], epsilon=1e-5)
    expected = torch.nn.functional.rms_norm(wide[0], (64,), wide[1], 1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    out.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    for tensor, reference in zip(own, wide, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight must have shape \[4\], got \[5\]"):
        rms_norm(torch.ones(2, 4), torch.ones(5), epsilon=1e-6)
    with pytest.raises(ValueError, match="x must be float32 or bfloat16"):
        rms_norm(torch.ones(2, 4, dtype=torch.float64), torch.ones(4), epsilon=1e-6)
