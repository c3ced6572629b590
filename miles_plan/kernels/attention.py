"""Causal attention with exact sums, over packed sequences (trainer) and over a paged KV cache (rollout).

Guarantee: a query's output depends on its own q and on k, v at its own and earlier positions; not on padding, on later
tokens, on the other sequences, on how the context was cut into pages or chunks, nor on its length. So decode,
chunked prefill and the trainer's forward give the same bits.

How: scores q.k are exact (q and k rounded to per-row grids); p = exp(score - max) is summed on a static grid sized for
`max_context`, a constant of the model; for p.v every value row v_j is scaled by its own power of two s_j, so that hidden
and later keys cannot matter, s_j is folded into p_j, and the row of p_j s_j is rounded to a grid of its own (exact) sum,
which bounds every partial sum of p.v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles_plan.kernels.autograd import apply
from miles_plan.kernels.checks import check_float, check_integer, check_shape
from miles_plan.kernels.elementary import exp, log
from miles_plan.kernels.exact import MANTISSA_BITS, bits_for, ceil_log2, exact_sum, power_of_two_above, round_to_grid, row_bound

_MAX_SCORES = 1 << 17  # scores worked on at a time: 1 MiB in float64, a core's cache; measured 1.6 times faster than 32 MiB
_MAX_GATHERED = 1 << 24  # elements of keys copied out of their pages at a time: 128 MiB
_HIDDEN = float("-inf")
_PRODUCT_BITS = MANTISSA_BITS // 2  # of p and of v: partial sums of p.v stay below the bound of the sum of p


@dataclass(frozen=True, slots=True)
class PreparedKeyValue:
    """Keys and values as attention consumes them, float64, made once per token and kept in the KV cache.

    keys [..., D]: on the grid of their own row. values [..., D]: divided by value_scale [...], a power of two above every
    element of the row, and on a grid of [-1, 1].
    """

    keys: Tensor
    values: Tensor
    value_scale: Tensor


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of similar length, padded to [B, L].

    sequences int64 [B]: which ones; rows int64 [B, L]: their packed tokens, any token as filler; slots int64: flat
    places in [B, L] that hold a token, and tokens int64: which one.
    """

    sequences: Tensor
    rows: Tensor
    slots: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """Ragged sequences laid one after the other, with the index tensors that all layers share."""

    lengths: tuple[int, ...]
    positions: Tensor  # int64 [M], of each token in its sequence
    buckets: tuple[Bucket, ...]

    @property
    def num_tokens(self) -> int:
        """M."""
        return sum(self.lengths)


def pack_sequences(lengths: Sequence[int], *, device: torch.device | str = "cpu", waste: float = 1.25) -> PackedSequences:
    """Index tensors for sequences of these lengths; padded work in a bucket stays below `waste` times the real work."""
    if any(length < 1 for length in lengths):
        raise ValueError(f"lengths must be at least 1, got {list(lengths)}")
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups: list[list[int]] = []
    for index in order:
        if groups and lengths[groups[-1][0]] ** 2 <= waste * lengths[index] ** 2 + 256:
            groups[-1].append(index)
        else:
            groups.append([index])
    positions = torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.zeros(0, dtype=torch.int64)
    buckets = tuple(_bucket(group, starts, lengths, device) for group in groups)
    return PackedSequences(tuple(int(n) for n in lengths), positions.to(device), buckets)


def _bucket(group: list[int], starts: Sequence[int], lengths: Sequence[int], device: torch.device | str) -> Bucket:
    first = torch.tensor([starts[index] for index in group])[:, None]
    length = torch.tensor([lengths[index] for index in group])[:, None]
    offsets = torch.arange(int(length.max()))[None, :]
    real = offsets < length
    rows = torch.where(real, first + offsets, first)
    slots = real.flatten().nonzero().squeeze(1)
    tokens = rows.flatten()[slots]
    return Bucket(torch.tensor(group, device=device), rows.to(device), slots.to(device), tokens.to(device))


def prepare_keys_values(keys: Tensor, values: Tensor) -> PreparedKeyValue:
    """Round keys and values [..., D] to their grids. ValueError for dtypes other than float32 and bfloat16."""
    check_float("keys", keys)
    check_float("values", values)
    scale = row_bound(values)
    return PreparedKeyValue(
        keys=round_to_grid(keys, row_bound(keys), bits_for(keys.shape[-1])[1]),
        values=round_to_grid(values.double() / scale, 1.0, _PRODUCT_BITS),
        value_scale=scale.squeeze(-1),
    )


def packed_attention(
    queries: Tensor, keys: Tensor, values: Tensor, sequences: PackedSequences, *, scale: float, max_context: int
) -> Tensor:
    """Causal attention inside each packed sequence: queries [M, heads, D], keys and values [M, kv_heads, D] -> [M, heads, D].

    Float32 or bfloat16, rounded once; scores are multiplied by `scale`. Differentiable: the backward recomputes
    probabilities in float32. Guarantee: see the module. ValueError for bad dtypes, shapes, or a sequence beyond max_context.
    """
    for name, tensor in (("queries", queries), ("keys", keys), ("values", values)):
        check_float(name, tensor)
        check_shape(name, tensor, (sequences.num_tokens, None, queries.shape[-1]))
    check_shape("values", values, tuple(keys.shape))
    _check_heads(queries.shape[1], keys.shape[1])
    if max(sequences.lengths, default=0) > max_context:
        raise ValueError(f"a sequence of {max(sequences.lengths)} tokens is beyond max_context={max_context}")
    result: Tensor = apply(_PackedAttention, queries, keys, values, sequences, scale, max_context)
    return result


def paged_attention(
    queries: Tensor,
    pool: PreparedKeyValue,
    page_table: Tensor,
    context_tokens: Tensor,
    *,
    scale: float,
    max_context: int,
) -> Tensor:
    """Attention of new tokens over cached keys: queries [B, L, heads, D] -> [B, L, heads, D] in queries' dtype.

    The pool holds keys and values [pages, kv_heads, page_tokens, D] and value_scale [pages, kv_heads, page_tokens];
    page_table int64 [B, P] lists each sequence's pages in order (any page of finite numbers as filler); context_tokens int64
    [B] counts the tokens before the first query. Query i sees positions 0 .. context_tokens + i, its own key included, so
    keys are written first. Guarantee: see the module. Not differentiable. ValueError for bad dtypes or shapes.
    """
    check_float("queries", queries)
    check_integer("page_table", page_table)
    check_shape("page_table", page_table, (queries.shape[0], None))
    check_shape("context_tokens", context_tokens, (queries.shape[0],))
    _check_heads(queries.shape[2], pool.keys.shape[1])
    positions = context_tokens[:, None] + torch.arange(queries.shape[1], device=queries.device)
    out = torch.empty_like(queries)
    rows = max(1, _MAX_GATHERED // max(1, page_table.shape[1] * pool.keys[0].numel()))
    for row in range(0, queries.shape[0], rows):
        here = slice(row, row + rows)
        gathered = _gather_pages(pool, page_table[here])
        attended, _ = _attend(queries[here].transpose(1, 2), gathered, positions[here], scale, max_context)
        out[here] = attended.transpose(1, 2)
    return out


def _check_heads(heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise ValueError(f"queries have {heads} heads, which must be a multiple of the {kv_heads} key and value heads")


def _gather_pages(pool: PreparedKeyValue, page_table: Tensor) -> PreparedKeyValue:
    """[B, kv_heads, P x page_tokens, ...] of the listed pages, contiguous."""
    pages, kv_heads, page_tokens, head_dim = pool.keys.shape
    batch, width = page_table.shape
    index = (page_table[:, None, :] * kv_heads + torch.arange(kv_heads, device=page_table.device)[None, :, None]).flatten()
    shape = (batch, kv_heads, width * page_tokens, head_dim)
    return PreparedKeyValue(
        keys=pool.keys.view(pages * kv_heads, -1).index_select(0, index).view(shape),
        values=pool.values.view(pages * kv_heads, -1).index_select(0, index).view(shape),
        value_scale=pool.value_scale.view(pages * kv_heads, -1).index_select(0, index).view(shape[:3]),
    )


def _attend(
    queries: Tensor, context: PreparedKeyValue, positions: Tensor, scale: float, max_context: int
) -> tuple[Tensor, Tensor]:
    """The one place that chooses the implementation: queries [B, heads, L, D] over keys [B, kv_heads, T, D].

    Query (b, i) sees keys 0 .. positions[b, i]. Returns the output in queries' dtype and the log of the sum of
    exponentials [B, heads, L], float32. Blocks of sequences and queries bound the memory; their size cannot matter.
    """
    batch, heads, length, _ = queries.shape
    num_keys = context.keys.shape[2]
    out = torch.empty_like(queries)
    normaliser = queries.new_empty((batch, heads, length), dtype=torch.float32)
    rows = max(1, _MAX_SCORES // max(1, heads * length * num_keys))
    steps = max(1, _MAX_SCORES // max(1, heads * num_keys)) if rows == 1 else length
    for row in range(0, batch, rows):
        here = slice(row, row + rows)
        part = PreparedKeyValue(context.keys[here], context.values[here], context.value_scale[here])
        for step in range(0, length, steps):
            block = slice(step, step + steps)
            attended, log_sum = _attend_block(queries[here, :, block], part, positions[here, block], scale, max_context)
            out[here, :, block] = attended
            normaliser[here, :, block] = log_sum
    return out, normaliser


def _attend_block(
    queries: Tensor, context: PreparedKeyValue, positions: Tensor, scale: float, max_context: int
) -> tuple[Tensor, Tensor]:
    batch, heads, length, head_dim = queries.shape
    kv_heads, num_keys = context.keys.shape[1:3]
    rows = heads // kv_heads * length
    on_grid = round_to_grid(queries, row_bound(queries), bits_for(head_dim)[0])
    scores = torch.bmm(
        on_grid.reshape(batch * kv_heads, rows, head_dim), context.keys.reshape(batch * kv_heads, num_keys, head_dim).mT
    )
    scores = scores.mul_(scale).view(batch, heads, length, num_keys)
    hidden = torch.arange(num_keys, device=queries.device) > positions[:, None, :, None]
    scores.masked_fill_(hidden, _HIDDEN)
    largest = scores.amax(dim=-1, keepdim=True)
    # exp does not reach zero, but what it gives for hidden keys, about 1e-301, is rounded to zero by both grids below
    weights = exp(scores.sub_(largest))
    total = exact_sum(weights, bound=1.0, max_terms=max_context)
    grouped = weights.view(batch, kv_heads, rows, num_keys).mul_(context.value_scale[:, :, None, :])
    grouped = round_to_grid(grouped, _bound_of_sum(grouped, max_context), _PRODUCT_BITS)
    attended = torch.bmm(
        grouped.view(batch * kv_heads, rows, num_keys), context.values.reshape(batch * kv_heads, num_keys, head_dim)
    )
    attended = attended.view(batch, heads, length, head_dim).div_(total)
    return attended.float().to(queries.dtype), (largest + log(total)).squeeze(-1).float()


def _bound_of_sum(terms: Tensor, max_terms: int) -> Tensor:
    """A power of two above the sum of each row of non-negative terms, from an exact sum on the row's own grid."""
    rounded = round_to_grid(
        terms, power_of_two_above(terms.amax(dim=-1, keepdim=True)), MANTISSA_BITS - 1 - ceil_log2(max_terms)
    )
    return power_of_two_above(rounded.sum(dim=-1, keepdim=True))


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, sequences: PackedSequences, scale: float, max_context: int
    ) -> Tensor:
        prepared = prepare_keys_values(keys, values)
        out = torch.empty_like(queries)
        normaliser = queries.new_empty(queries.shape[:2], dtype=torch.float32)
        for bucket in sequences.buckets:
            context = PreparedKeyValue(
                prepared.keys[bucket.rows].transpose(1, 2),
                prepared.values[bucket.rows].transpose(1, 2),
                prepared.value_scale[bucket.rows].transpose(1, 2),
            )
            positions = torch.arange(bucket.rows.shape[1], device=queries.device).expand(bucket.rows.shape)
            attended, log_sum = _attend(queries[bucket.rows].transpose(1, 2), context, positions, scale, max_context)
            out[bucket.tokens] = attended.transpose(1, 2).flatten(0, 1)[bucket.slots]
            normaliser[bucket.tokens] = log_sum.transpose(1, 2).flatten(0, 1)[bucket.slots]
        ctx.save_for_backward(queries, keys, values, out, normaliser)
        ctx.sequences, ctx.scale = sequences, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, out, normaliser = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (queries, keys, values)]
        delta = (grad.float() * out.float()).sum(dim=-1)
        for bucket in ctx.sequences.buckets:
            padded = [_pad(tensor, bucket) for tensor in (queries, keys, values, grad, normaliser[..., None], delta[..., None])]
            for total, part in zip(grads, _backward_bucket(*padded, scale=ctx.scale), strict=True):
                total[bucket.tokens] = part.transpose(1, 2).flatten(0, 1)[bucket.slots].to(total.dtype)
        return *grads, None, None, None


def _pad(packed: Tensor, bucket: Bucket) -> Tensor:
    """[M, heads, D] -> [B, heads, L, D] float32, zeros where no token is."""
    batch, length = bucket.rows.shape
    padded = packed.new_zeros((batch * length, *packed.shape[1:]), dtype=torch.float32)
    padded[bucket.slots] = packed[bucket.tokens].float()
    return padded.view(batch, length, *packed.shape[1:]).transpose(1, 2)


def _split_heads(x: Tensor, kv_heads: int) -> Tensor:
    batch, heads, length, head_dim = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)


def _backward_bucket(
    queries: Tensor, keys: Tensor, values: Tensor, grad: Tensor, normaliser: Tensor, delta: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the formulas of FlashAttention-2 (arXiv 2307.08691), one sequence block at a time."""
    batch, heads, length, _ = queries.shape
    kv_heads = keys.shape[1]
    rows = max(1, _MAX_SCORES // (heads * length * length))
    hidden = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu_(1)
    parts = []
    for row in range(0, batch, rows):
        here = slice(row, row + rows)
        q, g, lse, d = (_split_heads(t[here], kv_heads) for t in (queries, grad, normaliser, delta))
        k, v = keys[here, :, None], values[here, :, None]
        weights = (q @ k.mT).mul_(scale).sub_(lse).exp_().masked_fill_(hidden, 0.0)
        grad_scores = (g @ v.mT).sub_(d).mul_(weights).mul_(scale)
        grad_q = (grad_scores @ k).flatten(1, 2)
        grad_k = (grad_scores.mT @ q).sum(dim=2)
        grad_v = (weights.mT @ g).sum(dim=2)
        parts.append((grad_q, grad_k, grad_v))
    grad_queries, grad_keys, grad_values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return grad_queries, grad_keys, grad_values
