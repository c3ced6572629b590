from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from miles_plan.kernels.collectives import RankGroup
from miles_plan.kernels.log_prob import log_prob


def inputs(vocab_size: int = 41, rows: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab_size, generator=generator) * 8
    return logits, torch.randint(0, vocab_size, (rows,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_value_and_gradients_against_float64(temperature: float) -> None:
    logits, targets = inputs()
    logits.requires_grad_()
    wide = logits.detach().double().requires_grad_()
    log_probs, entropy = log_prob(logits, targets, temperature=temperature)
    expected = torch.log_softmax(wide / (temperature or 1.0), dim=-1)
    chosen, expected_entropy = expected.gather(1, targets[:, None])[:, 0], -(expected.exp() * expected).sum(dim=-1)
    torch.testing.assert_close(log_probs.double(), chosen, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-6, atol=1e-6)
    weights = torch.linspace(-1, 2, len(targets))
    (log_probs * weights + entropy * weights.flip(0)).sum().backward()
    (chosen * weights + expected_entropy * weights.flip(0)).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [2, 41, 5000])
def test_a_row_alone_equals_the_row_in_a_batch(vocab_size: int) -> None:
    logits, targets = inputs(vocab_size)
    whole = log_prob(logits, targets, temperature=0.9)
    for row in range(len(targets)):
        alone = log_prob(logits[[row]], targets[[row]], temperature=0.9)
        assert torch.equal(alone[0][0], whole[0][row])
        assert torch.equal(alone[1][0], whole[1][row])


@pytest.mark.parametrize("size", [2, 3])
def test_sharded_vocabulary_gives_the_bits_of_one_rank(
    size: int, run_ranks: Callable[[int, Callable[[RankGroup], Any]], list[Any]]
) -> None:
    logits, targets = inputs(vocab_size=41)
    expected = log_prob(logits, targets, temperature=0.8)
    share = -(-41 // size)

    def own_part(group: RankGroup) -> tuple[Tensor, Tensor]:
        start = group.rank * share
        own = logits[:, start : start + share]
        return log_prob(own, targets, temperature=0.8, vocab_size=41, vocab_start=start, group=group)

    for result in run_ranks(size, own_part):
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])


def test_the_denominator_is_an_exact_sum() -> None:
    logits, _ = inputs(vocab_size=5000)
    targets = logits.argmax(dim=-1)  # a log-prob near zero shows the last bits of the denominator
    logits[range(len(targets)), targets] += 25
    expected = log_prob(logits, targets)
    for seed in range(4):
        order = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))
        found = log_prob(logits[:, order], logits[:, order].argmax(dim=-1))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_no_rows() -> None:
    log_probs, entropy = log_prob(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert log_probs.shape == entropy.shape == (0,)


def test_bad_arguments_are_named() -> None:
    logits, targets = inputs()
    with pytest.raises(ValueError, match="logits must be float32"):
        log_prob(logits.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"targets must have shape \[23\]"):
        log_prob(logits, targets[:5])
    with pytest.raises(ValueError, match="temperature must not be negative"):
        log_prob(logits, targets, temperature=-1.0)
