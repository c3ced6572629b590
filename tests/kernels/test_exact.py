from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.kernels.exact import (
    MANTISSA_BITS,
    bits_for,
    ceil_log2,
    exact_sum,
    power_of_two_above,
    round_to_grid,
    row_bound,
)

floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.integers(1, 2**20))
def test_bits_leave_room_for_every_term(num_terms: int) -> None:
    first, second = bits_for(num_terms)
    assert first + second + ceil_log2(num_terms) == MANTISSA_BITS
    assert abs(first - second) <= 1


@given(floats32)
def test_bound_is_a_tight_power_of_two_above(value: float) -> None:
    bound = power_of_two_above(torch.tensor([abs(value)])).item()
    assert Fraction(bound).numerator & (Fraction(bound).numerator - 1) == 0
    assert abs(value) < bound
    assert bound <= max(2 * abs(value), 2.0**-148)


@given(st.lists(floats32, min_size=1, max_size=8), st.integers(1, 30))
def test_rounding_goes_to_the_nearest_multiple_of_the_grid(values: list[float], bits: int) -> None:
    row = torch.tensor([values], dtype=torch.float32)
    bound = row_bound(row)
    step = Fraction(bound.item()) / 2**bits
    for value, rounded in zip(values, round_to_grid(row, bound, bits)[0].tolist(), strict=True):
        expected = round(Fraction(value) / step) * step  # Python rounds ties to even too
        assert Fraction(rounded) == expected


@settings(deadline=None)
@given(st.lists(floats32, min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_dot_product_of_rounded_rows_is_the_rational_one_in_any_order(values: list[float], random: object) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    w = torch.tensor(values[::-1], dtype=torch.float32)
    bits_x, bits_w = bits_for(len(values))
    on_grid = round_to_grid(x, row_bound(x), bits_x), round_to_grid(w, row_bound(w), bits_w)
    expected = sum(Fraction(a) * Fraction(b) for a, b in zip(on_grid[0].tolist(), on_grid[1].tolist(), strict=True))
    order = list(range(len(values)))
    random.shuffle(order)
    assert Fraction((on_grid[0] @ on_grid[1]).item()) == expected
    running = 0.0
    for index in order:
        running += on_grid[0][index].item() * on_grid[1][index].item()
    assert Fraction(running) == expected


def test_exact_sum_ignores_order_padding_and_splitting() -> None:
    terms = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = exact_sum(terms, bound=1.0, max_terms=4096)
    shuffled = terms[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(whole, exact_sum(shuffled, bound=1.0, max_terms=4096))
    assert torch.equal(whole, exact_sum(torch.nn.functional.pad(terms, (0, 999)), bound=1.0, max_terms=4096))
    halves = sum(exact_sum(part, bound=1.0, max_terms=4096) for part in terms.split(333))
    assert torch.equal(whole, halves)
    torch.testing.assert_close(whole.squeeze(), terms.sum(), rtol=1e-9, atol=0)


def test_rows_that_are_zero_or_not_finite() -> None:
    zero = torch.zeros(2, 3)
    assert torch.equal(round_to_grid(zero, row_bound(zero), 20), zero.double())
    broken = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [1.0, 2.0]])
    rounded = round_to_grid(broken, row_bound(broken), 20)
    assert rounded[:2].isnan().all()
    assert torch.equal(rounded[2], torch.tensor([1.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("bits", [0, 52])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must lie in"):
        round_to_grid(torch.ones(1), 1.0, bits)
    with pytest.raises(ValueError, match="num_terms"):
        bits_for(0)
