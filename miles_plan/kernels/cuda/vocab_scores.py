"""What a row of logits says of its target: log-probability and entropy, and the gradient of both, in one read of the logits each.

A row, or a rank's columns of it, leaves its maximum m, s = sum of exp(x - m) and w = sum of (x - m) exp(x - m), where x = logit /
temperature. With the s and w of all ranks brought to one maximum, log-sum-exp = m + log s and entropy = log s - w / s; with
q = softmax(x), the gradients are d log-prob / d logit = (one-hot - q) / temperature and d entropy / d logit = -q (log q +
entropy) / temperature. One running maximum and sum a lane, as in Milakov & Gimelshein 2018, arXiv 1805.02867; rows do not
depend on each other. Where no GPU is present the references run, on float32 copies of so many rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import arguments
from .device import runs_triton
from .log_prob import row_and_columns
from .toolchain import jit, tl

CHUNK_ROWS = 1024  # of the references: [rows, columns] in float32, two copies at a time
LOG2_E = 1.4426950408889634


@jit(do_not_specialize=["rows", "stride", "first"])
def statistics_kernel(
    logits: tl.tensor, targets: tl.tensor, top: tl.tensor, sums: tl.tensor, rows: tl.tensor, stride: tl.tensor,
    first: tl.tensor, scale: tl.tensor, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Program: a row. top [rows]: m; sums [3, rows]: s, w, and x of the target less m, 0 where these columns do not hold it."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    in_log2 = scale * 1.4426950408889634  # what the hardware's exponential takes
    m = tl.full((BLOCK,), -1.0e30, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    w = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column = start + lane
        x = tl.load(logits + row * stride + column, mask=column < COLUMNS, other=0.0).to(tl.float32) * in_log2
        x = tl.where(column < COLUMNS, x, -1.0e30)  # finite, which 16 bits of it need not be
        m_new = tl.maximum(m, x)
        fall, below = m - m_new, x - m_new
        shrunk, own = tl.exp2(fall), tl.exp2(below)
        w = shrunk * (w + fall * s) + below * own
        s = shrunk * s + own
        m = m_new
    highest = tl.max(m, 0)
    fall = m - highest
    shrunk = tl.exp2(fall)
    target = tl.load(targets + row).to(tl.int64) - first
    here = (target >= 0) & (target < COLUMNS)
    chosen = tl.load(logits + row * stride + target, mask=here, other=0.0).to(tl.float32) * in_log2 - highest
    tl.store(top + row, highest * 0.6931471805599453)
    tl.store(sums + row, tl.sum(shrunk * s, 0))
    tl.store(sums + rows.to(tl.int64) + row, tl.sum(shrunk * (w + fall * s), 0) * 0.6931471805599453)
    tl.store(sums + rows.to(tl.int64) * 2 + row, tl.where(here, chosen * 0.6931471805599453, 0.0))


@jit(do_not_specialize=["stride", "first"])
def scores_gradient_kernel(
    logits: tl.tensor, targets: tl.tensor, total: tl.tensor, entropy: tl.tensor, grad_log_probs: tl.tensor,
    grad_entropy: tl.tensor, out: tl.tensor, stride: tl.tensor, first: tl.tensor, scale: tl.tensor, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Program row * blocks of columns + block; the columns from COLUMNS to PADDED get 0."""
    row, column = row_and_columns(PADDED, BLOCK)
    real = column < COLUMNS
    log_q = tl.load(logits + row * stride + column, mask=real, other=0.0).to(tl.float32) * scale - tl.load(total + row)
    own, spread = tl.load(grad_log_probs + row), tl.load(grad_entropy + row)
    value = -(own + spread * (log_q + tl.load(entropy + row))) * tl.exp2(log_q * 1.4426950408889634)
    value += tl.where(column == tl.load(targets + row).to(tl.int64) - first, own, 0.0)
    tl.store(out + row * PADDED + column, tl.where(real, value * scale, 0.0).to(out.dtype.element_ty), mask=column < PADDED)


def row_statistics(
    logits: torch.Tensor, targets: torch.Tensor, *, first: int, columns: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """m float32 [r], and float32 [3, r]: s, w and x - m of the target (0 where these columns do not hold it).

    logits: [r, v] bf16, fp16 or fp32, last dimension contiguous, of which the first `columns` stand for tokens first .. first +
    columns - 1. targets: int64 [r]. temperature: positive. Without columns m is -inf and the rest 0.

    Raises ValueError naming a wrong argument.
    """
    _check(logits, targets, columns, temperature)
    rows = len(logits)
    top, sums = (torch.empty(*shape, rows, dtype=torch.float32, device=logits.device) for shape in ((), (3,)))
    if not columns:
        return top.fill_(float("-inf")), sums.zero_()
    if runs_triton(logits.device):
        if rows:
            statistics_kernel[(rows,)](
                logits, targets, top, sums, rows, logits.stride(0), first, 1.0 / temperature, COLUMNS=columns, BLOCK=2048,
                num_warps=4,
            )  # fmt: skip
        return top, sums
    for span in _chunks(rows):
        top[span], sums[:, span] = _chunk_statistics(logits[span, :columns], targets[span], first, temperature)
    return top, sums


def scores_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_sum_exp: torch.Tensor,
    entropy: torch.Tensor,
    grad_log_probs: torch.Tensor,
    grad_entropy: torch.Tensor,
    *,
    first: int,
    columns: int,
    temperature: float,
) -> torch.Tensor:
    """The gradient of the logits in their dtype, 0 in the columns that stand for no token; all else float32 [r]."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if not columns or not gradient.numel():
        return gradient.zero_()
    if runs_triton(logits.device):
        rows, padded = logits.shape
        scores_gradient_kernel[(rows * -(-padded // 4096),)](
            logits, targets, log_sum_exp, entropy, grad_log_probs.contiguous(), grad_entropy.contiguous(), gradient,
            logits.stride(0), first, 1.0 / temperature, COLUMNS=columns, PADDED=padded, BLOCK=4096, num_warps=8,
        )  # fmt: skip
        return gradient
    gradient[:, columns:] = 0
    for span in _chunks(len(logits)):
        given = grad_log_probs[span], grad_entropy[span], entropy[span]
        gradient[span, :columns] = _chunk_gradient(
            logits[span, :columns], targets[span], log_sum_exp[span], given, first, temperature
        )
    return gradient


def _chunk_statistics(logits: torch.Tensor, targets: torch.Tensor, first: int, temperature: float) -> tuple[torch.Tensor, ...]:
    """A function, so that its two float32 copies are gone when the next chunk makes its own."""
    shifted = _scaled(logits, temperature)
    top = shifted.amax(dim=-1)
    shifted.sub_(top[:, None])
    here, column = _own_targets(targets, first, logits.shape[1])
    chosen = torch.where(here, shifted.gather(1, column[:, None]).squeeze(1), 0.0)
    weights = shifted.exp()
    return top, torch.stack([weights.sum(dim=-1), shifted.mul_(weights).sum(dim=-1), chosen])


def _chunk_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_sum_exp: torch.Tensor,
    given: tuple[torch.Tensor, ...],
    first: int,
    temperature: float,
) -> torch.Tensor:
    """In the logits' dtype. given: gradients of log-probs and entropies, and the entropies, [r] each."""
    grad_log_probs, grad_entropy, entropy = given
    part = _scaled(logits, temperature).sub_(log_sum_exp[:, None])
    q = part.exp()
    part.add_(entropy[:, None]).mul_(-grad_entropy[:, None]).sub_(grad_log_probs[:, None]).mul_(q)
    del q
    here, column = _own_targets(targets, first, logits.shape[1])
    part.scatter_add_(1, column[:, None], torch.where(here, grad_log_probs, 0.0)[:, None])
    return part.div_(temperature).to(logits.dtype)


def _check(logits: torch.Tensor, targets: torch.Tensor, columns: int, temperature: float) -> None:
    arguments.require_dims("logits", logits, 2, "[rows, columns]")
    arguments.require_dtype("logits", logits, (torch.bfloat16, torch.float16, torch.float32))
    arguments.require_contiguous_rows("logits", logits)
    arguments.require_dtype("targets", targets, (torch.int64,))
    arguments.require_shape("targets", targets, (logits.shape[0],), "[rows]")
    arguments.require_same_device(logits=logits, targets=targets)
    if not 0 <= columns <= logits.shape[1]:
        raise ValueError(f"columns is {columns}; allowed: 0 to the {logits.shape[1]} of logits")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; allowed: a positive number")


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """A float32 copy of logits / temperature."""
    copy = logits.to(torch.float32, copy=True)
    return copy if temperature == 1.0 else copy.div_(temperature)


def _chunks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, rows))


def _own_targets(targets: torch.Tensor, first: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets lie in these columns, and where (0 for the others)."""
    here = (targets >= first) & (targets < first + columns)
    return here, torch.where(here, targets - first, 0)
