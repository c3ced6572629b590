"""Log-probabilities over a vocabulary, without float32 logits in memory, the same bits on 1, 2, 4, 8 or 16 ranks.

The vocabulary is cut into 16 equal chunks by absolute column. Each (row, chunk) has a maximum and a sum of exponentials (Milakov &
Gimelshein 2018, arXiv 1805.02867); a row's 16 pairs are then brought to one maximum and added as a balanced tree. A rank that owns
whole chunks makes whole pairs, so tensor parallelism changes who computes a pair and nothing else. Maxima and exponents are in
units of log2, which is what the hardware's exponential takes.

Within a chunk, columns c to c + 255 belong to group (c // 256) % 8, and column c to the group's lane (c // 8) % 32. A group finds
its maximum first, which puts all its loads under way at once; then a lane adds its eights of columns in ascending order, each
eight as a tree, and lanes and groups are added as trees. A tree adds the second half onto the first, so each of its sums has
two terms, and no layout of threads can show. A log-probability that rounding puts above 0 is 0.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from . import arguments
from .device import runs_triton
from .overlap import begin, overlap
from .toolchain import jit, tl

CHUNKS = 16
GROUPS = 8  # of a chunk; a warp's work each
STEP = GROUPS * 32 * 8  # columns of a chunk that its groups' lanes hold at a time
COMBINED_ROWS = 4  # of a program that folds them, a warp each
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@jit
def tree_sum(x: tl.tensor) -> tl.tensor:
    """Sum along axis 1, a power of two long: the second half onto the first, and so on."""
    n: tl.constexpr = x.shape[1]
    if n == 1:
        return tl.sum(x, 1)
    else:  # the compiler takes one of two returns only so
        return tree_sum(tl.sum(tl.reshape(x, (x.shape[0], 2, n // 2)), 1))


@jit
def at_most_zero(log_prob: tl.tensor) -> tl.tensor:
    """No probability is above one: what a certain token's log-probability exceeds 0 by is the rounding of its log-sum-exp."""
    return tl.where(log_prob > 0.0, 0.0, log_prob)  # what is not a number stays so, and is seen


@jit
def _fold(m: tl.tensor, s: tl.tensor) -> tl.tensor:
    """Pairs [A, N] brought to one maximum and added: two [A]."""
    top = tl.max(m, 1)
    return top, tree_sum(s * tl.exp2(m - top[:, None]))


@jit(do_not_specialize=["stride"])
def partial_kernel(
    logits: tl.tensor, part_m: tl.tensor, part_s: tl.tensor, stride: tl.tensor, scale: tl.tensor,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr,
    ALIGNED: tl.constexpr, EACH: tl.constexpr, OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """Program row * CHUNKS + chunk, a warp a group; pairs [rows, CHUNKS, GROUPS]: a group's maximum, and its sum of
    exp2(x - maximum) with x = logit * scale, one fused multiply-add each. Warps never meet, so none waits for another.

    ALIGNED: rows and chunks begin at multiples of 16 bytes. EACH: `scale` points to one a row.
    """
    begin(OVERLAP)
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    if EACH:
        scale = tl.load(scale + row)
    chunk = tl.program_id(0) % CHUNKS  # neighbours read neighbouring memory
    if ALIGNED:
        stride = stride // 8 * 8  # says what the compiler cannot know of an argument
    base = logits + row * stride + chunk * CHUNK
    at = tl.arange(0, GROUPS * 32)[:, None] * 8 + tl.arange(0, 8)[None, :]
    end = tl.minimum(COLUMNS - chunk * CHUNK, CHUNK)  # the last chunk may be shorter
    xs: tl.tensor = ()
    m = tl.full((GROUPS * 32,), float("-inf"), tl.float32)
    for step in tl.static_range(STEPS):
        column = step * (GROUPS * 256) + at
        if COLUMNS % CHUNK == 0 and (step + 1) * (GROUPS * 256) <= CHUNK:
            x = tl.load(base + column, eviction_policy="evict_first").to(tl.float32)
        else:
            x = tl.load(base + column, mask=column < end, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        m = tl.maximum(m, tl.max(x, 1))
        xs = xs + (x,)
    m = tl.maximum(tl.max(tl.reshape(m, (GROUPS, 32)), 1) * scale, -1.0e30)  # finite where a group has no column
    shift = tl.reshape(tl.broadcast_to(-m[:, None], (GROUPS, 32)), (GROUPS * 32,))
    s = tl.zeros((GROUPS * 32,), tl.float32)
    for step in tl.static_range(STEPS):
        x = xs[step]
        s += tree_sum(tl.exp2(tl.fma(x, tl.zeros_like(x) + scale, shift[:, None])))
    total = tree_sum(tl.reshape(s, (GROUPS, 32)))
    # A group's first lane stores its pair. The addresses count on along the lanes, or else the compiler would lay the values
    # out anew for the store, which takes barriers.
    place = (tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS))[:, None] + tl.arange(0, 32)[None, :]
    leader = tl.broadcast_to(tl.arange(0, 32)[None, :] == 0, (GROUPS, 32))
    tl.store(part_m + place, tl.broadcast_to(m[:, None], (GROUPS, 32)), mask=leader)
    tl.store(part_s + place, tl.broadcast_to(total[:, None], (GROUPS, 32)), mask=leader)


@jit
def fold_kernel(
    part_m: tl.tensor, part_s: tl.tensor, chunk_m: tl.tensor, chunk_s: tl.tensor, chunks: tl.tensor, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """Program: the pairs of BLOCK chunks from those of their groups."""
    begin(OVERLAP)
    chunk = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = chunk[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    there = chunk < chunks
    m, s = _fold(tl.load(part_m + at, mask=there[:, None], other=0.0), tl.load(part_s + at, mask=there[:, None], other=0.0))
    tl.store(chunk_m + chunk, m, mask=there)
    tl.store(chunk_s + chunk, s, mask=there)


@jit
def _target_logit(
    logits: tl.tensor, targets: tl.tensor, row: tl.tensor, there: tl.tensor, stride: tl.tensor, vocab_start: tl.tensor,
    columns: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """The logit of each row's target, or 0 where these columns do not hold it."""
    column = tl.load(targets + row, mask=there, other=0).to(tl.int64) - vocab_start
    mine = there & (column >= 0) & (column < columns)
    return tl.load(logits + row.to(tl.int64) * stride + column, mask=mine, other=0.0).to(tl.float32)


@jit
def combine_kernel(
    part_m: tl.tensor, part_s: tl.tensor, chosen: tl.tensor, logits: tl.tensor, targets: tl.tensor, log_probs: tl.tensor,
    lse: tl.tensor, rows: tl.tensor, stride: tl.tensor, columns: tl.tensor, scale: tl.tensor, CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, PICK: tl.constexpr, EACH: tl.constexpr, OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """Program: BLOCK rows, from the pairs of their chunks (GROUPS 1) or of their chunks' groups. PICK takes the target's logit
    from the logits, which are then whole; otherwise it is in `chosen`. EACH: `scale` points to one a row."""
    begin(OVERLAP)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    if EACH:
        scale = tl.load(scale + row, mask=mask, other=0.0)
    at = row.to(tl.int64)[:, None] * (CHUNKS * GROUPS) + tl.arange(0, CHUNKS * GROUPS)[None, :]
    m = tl.load(part_m + at, mask=mask[:, None], other=0.0)
    s = tl.load(part_s + at, mask=mask[:, None], other=0.0)
    if PICK:
        picked = _target_logit(logits, targets, row, mask, stride, 0, columns)
    else:
        picked = tl.load(chosen + row, mask=mask, other=0.0)
    m, s = _fold(tl.reshape(m, (BLOCK * CHUNKS, GROUPS)), tl.reshape(s, (BLOCK * CHUNKS, GROUPS)))
    m, s = _fold(tl.reshape(m, (BLOCK, CHUNKS)), tl.reshape(s, (BLOCK, CHUNKS)))
    total = (m + tl.log2(s)) * 0.6931471805599453
    tl.store(lse + row, total, mask=mask)
    tl.store(log_probs + row, at_most_zero(tl.fma(picked, tl.zeros_like(picked) + scale, -total)), mask=mask)


@jit
def chosen_kernel(
    logits: tl.tensor, targets: tl.tensor, chosen: tl.tensor, stride: tl.tensor, vocab_start: tl.tensor, columns: tl.tensor,
    rows: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """The target's logit, or 0 where another shard owns the target."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    tl.store(chosen + row, _target_logit(logits, targets, row, there, stride, vocab_start, columns), mask=there)


@jit
def row_and_columns(COLUMNS: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """The row and the columns of program row * blocks of columns + block."""
    blocks = tl.cdiv(COLUMNS, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)


@jit
def _probability(x: tl.tensor, scale: tl.tensor, lse: tl.tensor) -> tl.tensor:
    """2 ** (x * scale - lse): one fused multiply-add before the exponential."""
    return tl.exp2(tl.fma(x, tl.zeros_like(x) + scale, tl.zeros_like(x) - lse))


@jit
def shift_kernel(
    logits: tl.tensor, lse: tl.tensor, out: tl.tensor, stride: tl.tensor, scale: tl.tensor, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Program row * blocks of columns + block: log-softmax = logit * scale - lse, one fused multiply-add as in `combine_kernel`."""
    row, column = row_and_columns(COLUMNS, BLOCK)
    mask = column < COLUMNS
    x = tl.load(logits + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    value = at_most_zero(tl.fma(x, tl.zeros_like(x) + scale, tl.zeros_like(x) - tl.load(lse + row)))
    tl.store(out + row * COLUMNS + column, value.to(out.dtype.element_ty), mask=mask)


@jit
def gradient_kernel(
    logits: tl.tensor, targets: tl.tensor, lse: tl.tensor, grad: tl.tensor, out: tl.tensor, stride: tl.tensor,
    scale: tl.tensor, vocab_start: tl.tensor, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Program row * blocks of columns + block: d logit = grad * scale * (one-hot - exp(x - lse))."""
    row, column = row_and_columns(COLUMNS, BLOCK)
    mask = column < COLUMNS
    x = tl.load(logits + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    p = _probability(x, scale * 1.4426950408889634, tl.load(lse + row) * 1.4426950408889634)
    hot = tl.where(column == tl.load(targets + row).to(tl.int64) - vocab_start, 1.0, 0.0)
    value = tl.load(grad + row) * scale * (hot - p)
    tl.store(out + row * COLUMNS + column, value.to(out.dtype.element_ty), mask=mask)


@jit
def table_gradient_kernel(
    logits: tl.tensor, lse: tl.tensor, grad: tl.tensor, out: tl.tensor, stride: tl.tensor, grad_stride: tl.tensor,
    scale: tl.tensor, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Program: a row of log_softmax's gradient, d logit = scale * (grad - exp(x - lse) * sum of the row's grad)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, COLUMNS, BLOCK):
        column = first + lane
        total += tl.load(grad + row * grad_stride + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    whole = tl.sum(total, 0)
    shift = tl.load(lse + row) * 1.4426950408889634
    for first in range(0, COLUMNS, BLOCK):
        column = first + lane
        mask = column < COLUMNS
        x = tl.load(logits + row * stride + column, mask=mask, other=0.0).to(tl.float32)
        p = _probability(x, scale * 1.4426950408889634, shift)
        g = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * COLUMNS + column, (scale * (g - p * whole)).to(out.dtype.element_ty), mask=mask)


def log_prob(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: Any = None,
) -> torch.Tensor:
    """log softmax(logits / temperature)[target] of each row, float32 [rows].

    logits: [rows, columns] bf16, fp16 or fp32, last dimension contiguous: the whole vocabulary, or with `group` this rank's
    columns, which begin at `vocab_start` of `vocab_size`; shards are whole sixteenths of the vocabulary.
    targets: int32 or int64 [rows], ids of the whole vocabulary. temperature: positive; or one a row, float32 [rows] on the
    logits' device, whose values are not looked at, with the bits of the same numbers given one by one.

    Order of the sum: see the module's text. Reads the logits once. Differentiable in logits (also on a shard) at one temperature.
    Raises ValueError naming a wrong argument.
    """
    vocab_size = logits.shape[-1] if vocab_size is None else vocab_size
    check_log_prob(logits, targets, temperature, vocab_start, vocab_size)
    if torch.is_grad_enabled() and logits.requires_grad:
        if isinstance(temperature, torch.Tensor):
            raise ValueError("temperature is a tensor and logits require gradients; allowed: one number for all rows")
        return _LogProb.apply(logits, targets, temperature, vocab_start, vocab_size, group)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    return log_prob_with_lse(logits, targets, temperature, vocab_start, vocab_size, group)[0]


def log_softmax(logits: torch.Tensor, *, temperature: float = 1.0, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """log softmax(logits / temperature), [rows, columns] in `out_dtype`; the same bits as `log_prob` in each target's column.

    Arguments as `log_prob`'s, whole vocabulary. Differentiable: a row's gradients are added in lanes of 1,024 columns, each lane
    in ascending order, then the lanes in one layout. Raises ValueError naming a wrong argument.
    """
    check_log_prob(
        logits, torch.zeros(logits.shape[:1], device=logits.device, dtype=torch.int64), temperature, 0, logits.shape[-1]
    )
    arguments.require_dtype("out_dtype", torch.empty(0, dtype=out_dtype), DTYPES)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _LogSoftmax.apply(logits, temperature, out_dtype)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    return _log_softmax(logits, temperature, out_dtype)[0]


def _log_softmax(logits: torch.Tensor, temperature: float, out_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The table and each row's log-sum-exp."""
    targets = torch.zeros(logits.shape[0], device=logits.device, dtype=torch.int64)
    lse = log_prob_with_lse(logits, targets, temperature, 0, logits.shape[1], None)[1]
    if not runs_triton(logits.device):
        return _at_most_zero(_fused(logits.float(), _scale(temperature), -lse[:, None])).to(out_dtype), lse
    out = torch.empty(logits.shape, device=logits.device, dtype=out_dtype)
    if out.numel():
        shift_kernel[(logits.shape[0] * -(-logits.shape[1] // 4096),)](
            logits, lse, out, logits.stride(0), _scale(temperature), COLUMNS=logits.shape[1], BLOCK=4096, num_warps=8
        )
    return out, lse


def check_log_prob(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float | torch.Tensor, vocab_start: int, vocab_size: int
) -> None:
    """Raise ValueError naming an argument of `log_prob` that is wrong."""
    arguments.require_dims("logits", logits, 2, "[rows, columns]")
    arguments.require_dtype("logits", logits, DTYPES)
    arguments.require_contiguous_rows("logits", logits)
    arguments.require_dtype("targets", targets, (torch.int32, torch.int64))
    arguments.require_shape("targets", targets, (logits.shape[0],), "[rows]")
    arguments.require_same_device(logits=logits, targets=targets)
    if isinstance(temperature, torch.Tensor):
        check_temperatures(logits, temperature)
    elif not temperature > 0:
        raise ValueError(f"temperature is {temperature}; allowed: a positive number")
    if logits.shape[1] != vocab_size:
        chunk = vocab_size // CHUNKS
        if vocab_size % CHUNKS or vocab_start % chunk or logits.shape[1] % chunk:
            raise ValueError(
                f"logits has {logits.shape[1]} columns from {vocab_start} of vocab_size {vocab_size}; allowed: whole "
                f"sixteenths of the vocabulary ({chunk} columns each), vocab_size a multiple of {CHUNKS}"
            )


def check_temperatures(logits: torch.Tensor, temperature: torch.Tensor) -> None:
    """Raise ValueError where one temperature a row is not given as it must be."""
    arguments.require_dtype("temperature", temperature, (torch.float32,))
    arguments.require_shape("temperature", temperature, (logits.shape[0],), "[rows]")
    arguments.require_same_device(logits=logits, temperature=temperature)


def _scale(temperature: float) -> float:
    """Of the temperature in float32, which is how SGLang keeps it; a trainer has it in float64."""
    return 1.0 / ctypes.c_float(temperature).value


def row_scales(temperature: float | torch.Tensor, factor: float = 1.0) -> float | torch.Tensor:
    """What rows' logits are multiplied by, a number or float32 [rows]: rounded for a tensor where a launch rounds a number."""
    if isinstance(temperature, torch.Tensor):
        return (1.0 / temperature.double() * factor).float()
    return _scale(temperature) * factor


def _fused(x: torch.Tensor, factor: float | torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
    """x * factor + addend rounded once, for the references."""
    return (x.double() * torch.as_tensor(factor, dtype=torch.float32, device=x.device).double() + addend.double()).float()


def chunk_columns(vocab_size: int) -> int:
    """Columns of a chunk."""
    return -(-vocab_size // CHUNKS)


def log_prob_partials(
    logits: torch.Tensor, vocab_size: int, temperature: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each chunk's maximum and sum of exponentials for the columns at hand: two float32 [rows, chunks here]."""
    if not runs_triton(logits.device):
        return _reference_fold(*_reference_groups(logits, vocab_size, temperature))
    part_m, part_s = _groups(logits, vocab_size, temperature)
    m, s = (torch.empty(part_m.shape[:2], device=logits.device, dtype=torch.float32) for _ in range(2))
    if m.numel():
        fold_kernel[(-(-m.numel() // 64),)](
            part_m, part_s, m, s, m.numel(), GROUPS=GROUPS, BLOCK=64, num_warps=1, enable_fp_fusion=False, **overlap(m.device)
        )
    return m, s


def _groups(logits: torch.Tensor, vocab_size: int, temperature: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each group's maximum and sum of exponentials: two float32 [rows, chunks here, GROUPS]."""
    chunk = chunk_columns(vocab_size)
    rows, columns = logits.shape
    chunks = CHUNKS if columns == vocab_size else columns // chunk
    aligned = chunk % 8 == 0
    if aligned and (logits.data_ptr() % 16 or logits.stride(0) % 8):
        logits = logits.clone(memory_format=torch.contiguous_format)
    m, s = (torch.empty(rows, chunks, GROUPS, device=logits.device, dtype=torch.float32) for _ in range(2))
    if rows:
        partial_kernel[(rows * chunks,)](
            logits, m, s, logits.stride(0), row_scales(temperature, LOG2_E), COLUMNS=columns, CHUNK=chunk, CHUNKS=chunks,
            GROUPS=GROUPS, STEPS=-(-chunk // STEP), ALIGNED=aligned, EACH=isinstance(temperature, torch.Tensor),
            num_warps=GROUPS, **overlap(logits.device),
        )  # fmt: skip
    return m, s


def _reference_groups(
    logits: torch.Tensor, vocab_size: int, temperature: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same groups, lanes and steps in plain torch."""
    rows, columns = logits.shape
    chunk = chunk_columns(vocab_size)
    chunks = CHUNKS if columns == vocab_size else columns // chunk
    scale = torch.as_tensor(row_scales(temperature, LOG2_E), dtype=torch.float32, device=logits.device).view(-1, 1, 1)
    steps = -(-chunk // STEP)
    padded = torch.full((rows, chunks, steps * STEP), float("-inf"), device=logits.device)
    for c in range(chunks):
        values = logits[:, c * chunk : min((c + 1) * chunk, columns)].float()
        padded[:, c, : values.shape[1]] = values
    x = padded.view(rows, chunks, steps, GROUPS, 32, 8)
    m = (x.amax((2, 4, 5)) * scale).clamp(min=-1.0e30)
    s = torch.zeros(rows, chunks, GROUPS, 32, device=logits.device)
    for step in range(steps):
        s = s + _tree_sum(_exp2(_fused(x[:, :, step], scale[..., None, None], -m[..., None, None])))
    return m, _tree_sum(s)


def _exp2(x: torch.Tensor) -> torch.Tensor:
    """In float64, so that rounding hides the last bit, in which torch's vector loop and the rest of a tensor differ."""
    return torch.exp2(x.double()).float()


def _tree_sum(x: torch.Tensor) -> torch.Tensor:
    """`tree_sum` along the last dimension."""
    while x.shape[-1] > 1:
        first, second = x.chunk(2, -1)
        x = first + second
    return x[..., 0]


def _reference_fold(m: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`_fold` along the last dimension."""
    top = m.amax(-1)
    return top, _tree_sum(s * _exp2(m - top[..., None]))


def combine_log_prob(
    m: torch.Tensor, s: torch.Tensor, chosen: torch.Tensor, temperature: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """From all chunks' pairs [rows, 16]: log-probabilities and log-sum-exps, float32 [rows].

    chosen: float32 [rows], each target's logit as it is in the logits.
    """
    if not runs_triton(m.device):
        return _reference_combine(m, s, chosen, temperature)
    return _combine(m[..., None], s[..., None], temperature, chosen=chosen)


def _combine(
    m: torch.Tensor, s: torch.Tensor, temperature: float | torch.Tensor, *, chosen: torch.Tensor | None = None,
    logits: torch.Tensor | None = None, targets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch `combine_kernel` on pairs [rows, 16, groups or 1] with the targets' logits, or the whole logits to take them from."""
    rows, chunks, groups = m.shape
    log_probs, lse = (torch.empty(rows, device=m.device, dtype=torch.float32) for _ in range(2))
    pick = logits is not None
    stride, columns = (logits.stride(0), logits.shape[1]) if logits is not None else (0, 0)
    if rows:
        combine_kernel[(-(-rows // COMBINED_ROWS),)](
            m, s, m if chosen is None else chosen, logits if pick else m, targets if pick else m, log_probs, lse, rows, stride,
            columns, row_scales(temperature), CHUNKS=chunks, GROUPS=groups, BLOCK=COMBINED_ROWS, PICK=pick,
            EACH=isinstance(temperature, torch.Tensor), num_warps=COMBINED_ROWS, enable_fp_fusion=False, **overlap(m.device),
        )  # fmt: skip
    return log_probs, lse


def _reference_combine(
    m: torch.Tensor, s: torch.Tensor, chosen: torch.Tensor, temperature: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    top, total = _reference_fold(m, s)
    lse = (top + torch.log2(total.double()).float()) * LN_2
    return _at_most_zero(_fused(chosen, row_scales(temperature), -lse)), lse


def _at_most_zero(log_prob: torch.Tensor) -> torch.Tensor:
    """`at_most_zero` for the references."""
    return torch.where(log_prob > 0.0, 0.0, log_prob)


def _chosen(logits: torch.Tensor, targets: torch.Tensor, vocab_start: int) -> torch.Tensor:
    rows, columns = logits.shape
    if not runs_triton(logits.device):
        column = targets.long() - vocab_start
        mine = (column >= 0) & (column < columns)
        picked = logits.gather(1, column.clamp(0, columns - 1)[:, None])[:, 0].float()
        return torch.where(mine, picked, 0.0)
    out = torch.empty(rows, device=logits.device, dtype=torch.float32)
    if rows:
        chosen_kernel[(-(-rows // 32),)](
            logits, targets, out, logits.stride(0), vocab_start, columns, rows, BLOCK=32, num_warps=1
        )
    return out


def log_prob_with_lse(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float | torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    group: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_prob` and each row's log-sum-exp over the whole vocabulary, float32 [rows]; no gradients, nothing checked."""
    if logits.shape[1] == vocab_size and runs_triton(logits.device):
        return _combine(*_groups(logits, vocab_size, temperature), temperature, logits=logits, targets=targets)
    m, s = log_prob_partials(logits, vocab_size, temperature)
    chosen = _chosen(logits, targets, vocab_start)
    if group is not None:
        m, s = _gather_chunks(m, group), _gather_chunks(s, group)
        torch.distributed.all_reduce(chosen, group=group)  # one rank adds the logit, the others zeros
    return combine_log_prob(m, s, chosen, temperature)


def _gather_chunks(x: torch.Tensor, group: Any) -> torch.Tensor:
    ranks = torch.distributed.get_world_size(group)
    parts = [torch.empty_like(x) for _ in range(ranks)]
    torch.distributed.all_gather(parts, x, group=group)
    return torch.cat(parts, 1)


class _LogProb(torch.autograd.Function):
    """log_prob whose backward writes softmax gradients in the logits' dtype."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float, vocab_start: int, vocab_size: int,
        group: Any,
    ) -> torch.Tensor:  # fmt: skip
        log_probs, lse = log_prob_with_lse(logits, targets, temperature, vocab_start, vocab_size, group)
        ctx.save_for_backward(logits, targets, lse)
        ctx.temperature, ctx.vocab_start = temperature, vocab_start
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, targets, lse = ctx.saved_tensors
        return log_prob_gradient(grads[0], logits, targets, lse, ctx.temperature, ctx.vocab_start), None, None, None, None, None


def log_prob_gradient(
    grad: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, temperature: float, vocab_start: int
) -> torch.Tensor:
    """Gradient of the logits at hand, in their dtype; grad and lse float32 [rows]."""
    scale = _scale(temperature)
    if not runs_triton(logits.device):
        p = torch.exp(logits.float() * scale - lse[:, None])
        column = targets.long()[:, None] - vocab_start
        hot = (torch.arange(logits.shape[1], device=logits.device)[None, :] == column).float()
        return (grad.float()[:, None] * scale * (hot - p)).to(logits.dtype)
    out = torch.empty(logits.shape, device=logits.device, dtype=logits.dtype)
    if out.numel():
        gradient_kernel[(logits.shape[0] * -(-logits.shape[1] // 4096),)](
            logits, targets, lse, grad.contiguous(), out, logits.stride(0), scale, vocab_start,
            COLUMNS=logits.shape[1], BLOCK=4096, num_warps=8,
        )  # fmt: skip
    return out


class _LogSoftmax(torch.autograd.Function):
    """log_softmax whose backward adds each row's gradients in one order."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, temperature: float, out_dtype: torch.dtype) -> torch.Tensor:
        out, lse = _log_softmax(logits, temperature, out_dtype)
        ctx.save_for_backward(logits, lse)
        ctx.temperature = temperature
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, lse = ctx.saved_tensors
        scale = _scale(ctx.temperature)
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        if not runs_triton(logits.device):
            p = torch.exp(logits.float() * scale - lse[:, None])
            wide = grad.float()
            return (scale * (wide - p * wide.sum(1, keepdim=True))).to(logits.dtype), None, None
        out = torch.empty(logits.shape, device=logits.device, dtype=logits.dtype)
        if out.numel():
            table_gradient_kernel[(logits.shape[0],)](
                logits, lse, grad, out, logits.stride(0), grad.stride(0), scale, COLUMNS=logits.shape[1], BLOCK=1024,
                num_warps=4,
            )  # fmt: skip
        return out, None, None
