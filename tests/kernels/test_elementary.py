from __future__ import annotations

import pytest
import torch

from miles_plan.kernels.elementary import exp, log


@pytest.mark.parametrize(("dtype", "limit", "tolerance"), [(torch.float64, 690.0, 3e-12), (torch.float32, 86.0, 2e-7)])
def test_exp_is_accurate(dtype: torch.dtype, limit: float, tolerance: float) -> None:
    x = torch.linspace(-limit, limit, 100_001, dtype=dtype)
    expected = torch.exp(x.double())
    assert ((exp(x).double() - expected).abs() / expected).max().item() < tolerance
    assert exp(torch.zeros(1, dtype=dtype)).item() == 1.0


def test_log_is_accurate() -> None:
    x = torch.logspace(-12, 12, 100_001, dtype=torch.float64)
    expected = torch.log(x)
    assert ((log(x) - expected).abs() / expected.abs().clamp_min(1e-3)).max().item() < 1e-14
    assert log(torch.ones(1, dtype=torch.float64)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bits_do_not_depend_on_the_place_in_the_tensor(dtype: torch.dtype) -> None:
    values = torch.randn(67, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 20
    one_by_one = torch.cat([exp(value[None]) for value in values])
    for offset in range(17):  # every alignment and tail of a vector register
        assert torch.equal(exp(values[offset:]), one_by_one[offset:])
    strided = torch.stack([values, values], dim=1)[:, 0]
    assert torch.equal(exp(strided), one_by_one)
    assert torch.equal(exp(values.expand(3, -1).T)[:, 1], one_by_one)


def test_log_bits_do_not_depend_on_the_place_in_the_tensor() -> None:
    values = torch.rand(67, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 100
    one_by_one = torch.cat([log(value[None]) for value in values])
    for offset in range(17):
        assert torch.equal(log(values[offset:]), one_by_one[offset:])
    assert torch.equal(log(torch.stack([values, values], dim=1)[:, 0]), one_by_one)


def test_extreme_arguments() -> None:
    x = torch.tensor([float("-inf"), -1e9, 1e9, float("nan")], dtype=torch.float64)
    assert 0 < exp(x)[0] < 1e-300
    assert 0 < exp(x)[1] < 1e-300
    assert 1e300 < exp(x)[2] < float("inf")
    assert exp(x)[3].isnan()
    assert exp(x.float())[3].isnan()


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x must be float32 or float64, got torch\.bfloat16"):
        exp(torch.ones(1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="x must be float64"):
        log(torch.ones(1))
