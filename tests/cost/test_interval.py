import pytest

from miles_plan.cost.interval import Term, around, exact, largest, no_data, total


def test_sums_keep_terms_and_take_the_weakest_basis() -> None:
    both = exact(2.0, "weights") + around(4.0, 0.25, "roofline", [Term("cache", 4.0)])
    assert (both.mid, both.basis) == (6.0, "roofline")
    assert both.term("weights") == 2.0
    assert both.low == pytest.approx(2 + 4 / 1.25)
    assert both.high == pytest.approx(7.0)


def test_a_total_of_same_names_merges_them() -> None:
    assert total([exact(1.0, "a"), exact(2.0, "a")]).terms == (Term("a", 3.0),)


def test_the_largest_bounds_every_part() -> None:
    top = largest([around(10.0, 0.1, "measured"), around(9.0, 1.0, "roofline")])
    assert top.mid == 10.0
    assert top.high == 18.0
    with pytest.raises(ValueError, match="no figures"):
        largest([])


def test_scaling_and_holding() -> None:
    figure = around(10.0, 0.5, "measured", [Term("a", 10.0)]).scaled(2.0)
    assert figure.holds(20.0)
    assert figure.term("a") == 20.0
    assert not figure.holds(31.0)


def test_no_data_is_an_answer() -> None:
    assert not no_data("step").known
    assert not no_data("step").holds(1.0)
