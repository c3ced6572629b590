from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.kernels.sample import sample, uniform

PROBABILITIES = torch.tensor([0.1, 0.2, 0.3, 0.4])


def draws(count: int = 100_000, **options: float) -> torch.Tensor:
    logits = PROBABILITIES.log().expand(count, 4)
    tokens = sample(logits, torch.arange(count), torch.full((count,), 5), seed=3, **options)
    return torch.bincount(tokens, minlength=4) / count


def test_frequencies_follow_the_probabilities() -> None:
    torch.testing.assert_close(draws(), PROBABILITIES, atol=5e-3, rtol=0)


def test_temperature_sharpens() -> None:
    squared = PROBABILITIES.square()
    torch.testing.assert_close(draws(temperature=0.5), squared / squared.sum(), atol=5e-3, rtol=0)


def test_top_k_and_top_p_cut_the_tail() -> None:
    torch.testing.assert_close(draws(top_k=2), torch.tensor([0, 0, 3 / 7, 4 / 7]), atol=5e-3, rtol=0)
    torch.testing.assert_close(draws(top_p=0.65), torch.tensor([0, 0, 3 / 7, 4 / 7]), atol=5e-3, rtol=0)
    torch.testing.assert_close(draws(top_p=0.75), torch.tensor([0, 2 / 9, 3 / 9, 4 / 9]), atol=5e-3, rtol=0)
    assert draws(top_k=1, count=100)[3] == 1
    assert draws(top_p=0.1, count=100)[3] == 1


def test_greedy_takes_the_lowest_index_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    ids = torch.tensor([0, 1])
    assert sample(logits, ids, ids, seed=0, temperature=0.0).tolist() == [1, 0]
    assert sample(logits, ids, ids, seed=0, top_k=1).tolist() == [1, 0]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**62), min_size=1, max_size=9), st.integers(0, 2**31))
def test_uniform_is_splitmix64_of_the_keys(seed: int, ids: list[int], position: int) -> None:
    def mix(state: np.uint64) -> np.uint64:
        with np.errstate(over="ignore"):
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            return state ^ (state >> np.uint64(31))

    drawn = uniform(seed, torch.tensor(ids), torch.full((len(ids),), position)).tolist()
    for sample_id, value in zip(ids, drawn, strict=True):
        bits = mix(mix(mix(np.uint64(seed)) ^ np.uint64(sample_id)) ^ np.uint64(position))
        assert value == int(bits >> np.uint64(11)) / 2**53


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 10}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.9}])
def test_a_row_alone_equals_the_row_in_a_batch(options: dict[str, float]) -> None:
    logits = torch.randn(50, 301, generator=torch.Generator().manual_seed(0)) * 3
    ids, positions = torch.arange(50) * 7, torch.arange(50) % 5
    whole = sample(logits, ids, positions, seed=11, **options)
    for row in range(50):
        one = [row]
        alone = sample(logits[one], ids[one], positions[one], seed=11, **options)
        assert torch.equal(alone, whole[one])


def test_every_key_matters() -> None:
    logits = torch.zeros(64, 1000)
    ids, zeros = torch.arange(64), torch.zeros(64, dtype=torch.int64)
    base = sample(logits, ids, zeros, seed=0)
    assert len(base.unique()) > 50
    assert not torch.equal(base, sample(logits, ids, zeros, seed=1))
    assert not torch.equal(base, sample(logits, ids, zeros + 1, seed=0))


def test_bad_arguments_are_named() -> None:
    logits, ids = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="0 < top_p <= 1"):
        sample(logits, ids, ids, seed=0, top_p=0.0)
    with pytest.raises(ValueError, match=r"positions must have shape \[2\]"):
        sample(logits, ids, ids[:1], seed=0)
