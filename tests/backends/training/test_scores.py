from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from miles_plan.backends.training.scores import SumOverGroup, VocabParallelScores
from miles_plan.kernels.cuda import vocab_scores

ROWS, VOCAB, PADDED = 7, 41, 48
Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(ROWS, VOCAB) * 3, torch.randint(0, VOCAB, (ROWS,)), torch.randn(2, ROWS)


def expected(temperature: float) -> Found:
    """By torch's log-softmax in float64."""
    logits, targets, weights = sample()
    logits = logits.double().requires_grad_()
    log_q = torch.log_softmax(logits / temperature, dim=-1)
    log_probs = log_q.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_q.exp() * log_q).sum(dim=-1)
    (log_probs * weights[0] + entropy * weights[1]).sum().backward()
    assert logits.grad is not None
    return log_probs.detach().float(), entropy.detach().float(), logits.grad.float()


def ours(first: int, stop: int, columns: int, temperature: float, group: Any) -> Found:
    logits, targets, weights = sample()
    own = torch.randn(ROWS, columns) * 50  # padding must not matter
    own[:, : stop - first] = logits[:, first:stop]
    own.requires_grad_()
    apply: Any = VocabParallelScores.apply
    log_probs, entropy = apply(own, targets, first, stop, temperature, group)
    (log_probs * weights[0] + entropy * weights[1]).sum().backward()
    assert own.grad is not None
    assert not own.grad[:, stop - first :].any()
    return log_probs.detach(), entropy.detach(), own.grad[:, : stop - first]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [3, 256])
def test_one_rank_agrees_with_log_softmax(temperature, chunk, monkeypatch):
    monkeypatch.setattr(vocab_scores, "CHUNK_ROWS", chunk)
    for found, wanted in zip(ours(0, VOCAB, PADDED, temperature, None), expected(temperature), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def run_rank(rank: int, rendezvous: str, ranks: int) -> Any:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    share = -(-VOCAB // 16) * 16 // ranks if ranks < 3 else 16
    first, stop = min(rank * share, VOCAB), min((rank + 1) * share, VOCAB)
    found = ours(first, stop, share, 0.7, dist.group.WORLD)
    part = torch.full((3,), float(rank + 1), requires_grad=True)
    apply: Any = SumOverGroup.apply
    total = apply(part, dist.group.WORLD)
    total.sum().backward()
    dist.destroy_process_group()
    return [each.numpy() for each in found], total.detach().numpy(), part.grad.numpy() if part.grad is not None else None


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_with_parts_of_the_vocabulary_agree_with_log_softmax(size, ranks):
    """Of four ranks the last has padding only."""
    answers = ranks.run(run_rank, size, size)
    log_probs, entropy, gradient = expected(0.7)
    for (found, found_entropy, _), total, part_gradient in answers:
        torch.testing.assert_close(torch.from_numpy(found), log_probs, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(torch.from_numpy(found_entropy), entropy, atol=2e-6, rtol=1e-5)
        assert (total == sum(range(1, size + 1))).all()
        assert (part_gradient == 1).all()
    whole = torch.cat([torch.from_numpy(found[2]) for found, _, _ in answers], dim=1)
    torch.testing.assert_close(whole, gradient, atol=2e-6, rtol=1e-5)


def test_no_rows_are_fine():
    apply: Any = VocabParallelScores.apply
    logits = torch.zeros(0, 8, requires_grad=True)
    log_probs, entropy = apply(logits, torch.zeros(0, dtype=torch.int64), 0, 8, 1.0, None)
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == entropy.shape == (0,)
