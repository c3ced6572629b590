from __future__ import annotations

import pytest
import torch

from miles_plan.kernels.swiglu import swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_place_or_stride(dtype: torch.dtype) -> None:
    fused = (torch.randn(9, 66, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    gate, up = fused.chunk(2, dim=-1)
    whole = swiglu(gate, up)
    assert torch.equal(swiglu(gate.contiguous(), up.contiguous()), whole)
    for row in range(9):
        for column in range(33):
            one = slice(column, column + 1)
            assert torch.equal(swiglu(gate[row, one], up[row, one]), whole[row, one])


def test_value_and_gradients_against_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = ((torch.randn(300, generator=generator) * 20).requires_grad_() for _ in range(2))
    wide = [tensor.detach().double().requires_grad_() for tensor in (gate, up)]
    out, expected = swiglu(gate, up), torch.nn.functional.silu(wide[0]) * wide[1]
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    out.sum().backward()
    expected.sum().backward()
    for tensor, reference in zip((gate, up), wide, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=1e-5, atol=1e-5)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="up must have shape"):
        swiglu(torch.ones(2, 3), torch.ones(2, 4))
