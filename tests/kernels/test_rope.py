from __future__ import annotations

import math

import pytest
import torch

from miles_plan.kernels.rope import rope, rope_table

FREQUENCIES = [1.0, 0.1, 0.01]


def test_table_holds_cos_and_sin_of_each_position() -> None:
    table = rope_table(FREQUENCIES, 50, scaling=2.0)
    assert table.shape == (50, 2, 3)
    angle = float(torch.tensor(7.0) * torch.tensor(0.1))  # angles are rounded to float32
    assert table[7, 0, 1].item() == pytest.approx(2 * math.cos(angle), rel=1e-7)
    assert table[7, 1, 1].item() == pytest.approx(2 * math.sin(angle), rel=1e-7)
    assert torch.equal(rope_table(FREQUENCIES, 10), rope_table(FREQUENCIES, 50)[:10])


def test_rotation_keeps_length_and_depends_on_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    table = rope_table(FREQUENCIES, 50)
    q, k = torch.randn(1, 1, 6, generator=generator), torch.randn(1, 1, 6, generator=generator)
    torch.testing.assert_close(rope(q, table[[31]]).norm(), q.norm())
    near, far = ((rope(q, table[[i]]) * rope(k, table[[j]])).sum() for i, j in ((9, 4), (45, 40)))
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_equals_the_row_in_a_batch(dtype: torch.dtype) -> None:
    x = torch.randn(13, 3, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    table = rope_table(FREQUENCIES, 13)
    whole = rope(x, table)
    assert all(torch.equal(rope(x[[i]], table[[i]])[0], whole[i]) for i in range(13))
    assert whole.dtype == dtype


def test_gradient_is_the_inverse_rotation() -> None:
    x = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float32).requires_grad_()
    table = rope_table(FREQUENCIES, 5)
    out = rope(x, table)
    out.backward(out.detach())
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x.detach())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"rotation must have shape \[4, 2, 3\]"):
        rope(torch.ones(4, 1, 6), rope_table(FREQUENCIES, 5))
