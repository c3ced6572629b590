"""Log-probabilities straight from hidden states: the head's product and `log_prob` together, block by block of rows.

The logits of all rows are never in memory: a block's are made, used and dropped, and made again for the gradient (the head is
the widest layer of a small model). On tensor-parallel ranks each owns a part of the vocabulary, as in Megatron-LM (arXiv
1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import arguments
from .gemm import TREE_LEAVES
from .log_prob import check_log_prob, log_prob_gradient, log_prob_with_lse
from .matmul import DTYPES, input_gradient, matmul, tree_all_reduce, weight_gradient
from .parallel_linear import partial_input_gradient, ranks_of


@dataclass(frozen=True, slots=True)
class Head:
    """How rows are scored; the fields are `linear_log_prob`'s arguments."""

    temperature: float
    rows_at_once: int
    vocab_start: int
    vocab_size: int
    group: Any

    def blocks(self, rows: int) -> Iterator[slice]:
        """Spans of rows in ascending order."""
        return (slice(first, first + self.rows_at_once) for first in range(0, rows, self.rows_at_once))


def linear_log_prob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    rows_at_once: int = 2048,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: Any = None,
) -> torch.Tensor:
    """log_prob(hidden @ weight.T, targets), float32 [rows], with the logits of `rows_at_once` rows in memory at a time.

    hidden: [rows, K], weight: [columns, K], the same one of bf16, fp16 and fp32, as `matmul`. targets, temperature: as
    `log_prob`. With `group`, weight holds this rank's rows of the head, which begin at `vocab_start` of `vocab_size`, as
    `log_prob`'s columns.

    The bits of `matmul` followed by `log_prob`, whatever `rows_at_once` and on any number of ranks. Differentiable: hidden's
    gradient is the tree over the vocabulary where that is a multiple of 128 (a chain otherwise, on one rank); weight's is a
    chain over the rows of a block, blocks added in ascending order in float32. Raises ValueError naming a wrong argument.
    """
    arguments.require_dims("hidden", hidden, 2, "[rows, K]")
    arguments.require_dtype("hidden", hidden, DTYPES)
    arguments.require_contiguous_rows("hidden", hidden)
    arguments.require_dims("weight", weight, 2, "[columns, K]")
    if rows_at_once < 1:
        raise ValueError(f"rows_at_once is {rows_at_once}; allowed: 1 or more")
    whole = weight.shape[0] if vocab_size is None else vocab_size
    head = Head(temperature, rows_at_once, vocab_start, whole, group)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        if group is not None and whole % (16 * TREE_LEAVES):
            raise ValueError(f"vocab_size is {whole} with a group; allowed: a multiple of {16 * TREE_LEAVES}")
        return _LinearLogProb.apply(hidden, weight, targets, head)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    return _forward(hidden, weight, targets, head)[0]


def _forward(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, head: Head
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and log-sum-exps."""
    found = []
    with torch.no_grad():
        for rows in head.blocks(hidden.shape[0]):
            logits, some = matmul(hidden[rows], weight), targets[rows]
            check_log_prob(logits, some, head.temperature, head.vocab_start, head.vocab_size)
            found.append(log_prob_with_lse(logits, some, head.temperature, head.vocab_start, head.vocab_size, head.group))
    if not found:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32)
    return torch.cat([log_probs for log_probs, _ in found]), torch.cat([lse for _, lse in found])


class _LinearLogProb(torch.autograd.Function):
    """linear_log_prob; the backward makes each block's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
        log_probs, lse = _forward(hidden, weight, targets, head)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.head = head
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, lse = ctx.saved_tensors
        head: Head = ctx.head
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        total = torch.zeros(weight.shape, device=weight.device, dtype=torch.float32)
        for rows in head.blocks(hidden.shape[0]):
            logits = matmul(hidden[rows], weight)
            d_logits = log_prob_gradient(grads[0][rows], logits, targets[rows], lse[rows], head.temperature, head.vocab_start)
            d_hidden[rows] = _input_gradient(d_logits, weight, head)
            total += weight_gradient(d_logits, hidden[rows], out_dtype=torch.float32)
        return d_hidden, total.to(weight.dtype), None, None


def _input_gradient(grad: torch.Tensor, weight: torch.Tensor, head: Head) -> torch.Tensor:
    if head.group is not None:
        return tree_all_reduce(partial_input_gradient(grad, weight, ranks_of(head.group)), weight.dtype, head.group)
    return input_gradient(grad, weight, "chain" if head.vocab_size % (16 * TREE_LEAVES) else "tree")
