"""What must agree bit for bit in attention: decode and prefill, chunks, pages and prefix hits, neighbours, gradients.

`invariance_checks` has the other ops and says what a check is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import attention as attention_module
from .attention import attention
from .draw import Draw


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes of keys and of values, and how many heads there are of queries and of keys."""

    d: int
    dv: int
    queries: int
    keys: int

    def __str__(self) -> str:
        """For a comparison's label."""
        return f"heads {self.queries}/{self.keys}, D={self.d}/{self.dv}"


# Those of the warp-specialised kernels, with groups that TMA copies and others; and those that take the portable kernel.
FAST_HEADS = (
    Heads(128, 128, 8, 2), Heads(64, 64, 14, 2), Heads(128, 128, 4, 4), Heads(192, 128, 4, 4), Heads(192, 128, 10, 2),
)  # fmt: skip
OTHER_HEADS = (
    Heads(80, 80, 4, 2), Heads(576, 512, 16, 1), Heads(256, 256, 4, 2), Heads(96, 96, 4, 4), Heads(576, 512, 128, 1),
    Heads(192, 192, 4, 2), Heads(32, 32, 6, 2), Heads(16, 16, 4, 1), Heads(512, 512, 4, 1),
)  # fmt: skip
FAST_PAGES = (16, 64, 256, 8, 128)
OTHER_PAGES = (16, 64, 48)


def check_attention(draw: Draw, dtype: torch.dtype) -> None:
    """A sequence in a ragged batch against decode steps, chunks, prefix hits and pages of it alone, and a batch of chunks."""
    _check_spans(draw, dtype, draw.pick(FAST_HEADS), draw.pick(FAST_PAGES), 2500)


def check_other_heads(draw: Draw, dtype: torch.dtype) -> None:
    """The same for head sizes that the kernels for Hopper do not take."""
    _check_spans(draw, dtype, draw.pick(OTHER_HEADS), draw.pick(OTHER_PAGES), 1500)


def _check_spans(draw: Draw, dtype: torch.dtype, heads: Heads, page: int, longest: int) -> None:
    lens = [draw.integer(1, longest)] + [draw.integer(0, longest) for _ in range(draw.integer(0, 3))]
    window = draw.pick([None, None, 300])
    causal = window is not None or draw.pick([True, True, False])
    mask: dict[str, Any] = {"window": window, "causal": causal}
    q, k, v = _inputs(draw, dtype, heads, sum(lens), sum(lens))
    whole = attention(q, k, v, q_starts=_starts(draw, lens), max_q_len=max(lens), **mask)
    label = f"lengths {lens}, {heads}, window={window}, causal={causal}"
    for rows in draw.spans(lens[0], 3):
        seen = rows.stop if causal else lens[0]
        part: dict[str, Any] = {
            "q_starts": draw.table(0, rows.stop - rows.start), "kv_lens": draw.table(seen),
            "max_q_len": rows.stop - rows.start, "max_kv_len": seen, **mask,
        }  # fmt: skip
        draw.compare(attention(q[rows], k, v, **part), whole[rows], f"rows {rows.start}:{rows.stop}, {label}")
        keys, table = _paged(draw, k[:seen], page)
        values, _ = _paged(draw, v[:seen], page, table)
        alone = attention(q[rows], keys, values, page_table=table, **part)
        draw.compare(alone, whole[rows], f"rows {rows.start}:{rows.stop}, pages of {page}, {label}")
    firsts = [sum(lens[:sequence]) for sequence in range(len(lens))]
    chunks = [draw.span(length) if length else slice(0, 0) for length in lens]
    picked = torch.cat(
        [torch.arange(first + rows.start, first + rows.stop) for first, rows in zip(firsts, chunks, strict=True)]
    )
    counts = [rows.stop - rows.start for rows in chunks]
    seen_lens = [rows.stop for rows in chunks] if causal else lens
    batch: dict[str, Any] = {"q_starts": _starts(draw, counts), "max_q_len": max(counts), "max_kv_len": max(lens), **mask}
    ragged = attention(q[picked], k, v, kv_starts=draw.table(*firsts), kv_lens=draw.table(*seen_lens), **batch)
    draw.compare(ragged, whole[picked], f"chunks {[(rows.start, rows.stop) for rows in chunks]}, {label}")


def _starts(draw: Draw, lens: Sequence[int]) -> torch.Tensor:
    return draw.table(0, *torch.tensor(lens).cumsum(0).tolist())


def _inputs(draw: Draw, dtype: torch.dtype, heads: Heads, queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    """Packed queries, keys and values."""
    q = draw.values(queries, heads.queries, heads.d, dtype=dtype)
    return q, draw.values(keys, heads.keys, heads.d, dtype=dtype), draw.values(keys, heads.keys, heads.dv, dtype=dtype)


def _paged(draw: Draw, x: torch.Tensor, page: int, table: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values of a sequence scattered over pages, what no key fills being NaN."""
    pages = -(-x.shape[0] // page)
    if table is None:
        table = draw.permutation(pages + 3)[None, :pages].to(torch.int32)
    out = torch.full((pages + 3, page, *x.shape[1:]), float("nan"), device=x.device, dtype=x.dtype)
    padded = torch.full((pages * page, *x.shape[1:]), float("nan"), device=x.device, dtype=x.dtype)
    padded[: x.shape[0]] = x
    out[table[0].long()] = padded.view(pages, page, *x.shape[1:])
    return out, table


def _pages_of(lens: Sequence[int], page: int, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A table of the pages that packed sequences get from `order`, int32 [sequences, pages], and the paged row of each key."""
    counts = [-(-length // page) for length in lens]
    table = torch.zeros(len(lens), max(counts), device=order.device, dtype=torch.int32)
    rows, used = [], 0
    for sequence, (length, count) in enumerate(zip(lens, counts, strict=True)):
        mine = order[used : used + count]
        table[sequence, :count] = mine.to(torch.int32)
        at = torch.arange(length, device=order.device)
        rows.append(mine[at // page] * page + at % page)
        used += count
    return table, torch.cat(rows)


def check_decode(draw: Draw, dtype: torch.dtype) -> None:
    """A ragged batch of decode steps, of one token or of a few, against each alone, split and whole, packed and paged.

    Few long sequences, or many short ones; with their longest as the bound, or one for which a CUDA graph might be captured.
    """
    heads = draw.pick([Heads(128, 128, 8, 2), Heads(128, 128, 16, 2), Heads(64, 64, 8, 8), Heads(192, 128, 16, 4)])
    each, page = draw.pick([1, 1, 2, 5, 16]), draw.pick([0, 64, 16])
    most_keys, sequences = draw.pick([(6000, draw.integer(2, 40)), (700, draw.integer(100, 400))])
    lens = [draw.integer(each, most_keys) for _ in range(sequences)]
    q, k, v = _inputs(draw, dtype, heads, len(lens) * each, sum(lens))
    starts = torch.arange(len(lens) + 1, device=draw.device, dtype=torch.int32) * each
    bound = draw.pick([max(lens), 40_960])
    batch: dict[str, Any] = {"q_starts": starts, "kv_lens": draw.table(*lens), "max_q_len": each, "max_kv_len": bound}
    keys, values = k, v
    if page:
        pages = sum(-(-length // page) for length in lens) + 3
        batch["page_table"], rows = _pages_of(lens, page, draw.permutation(pages))
        keys, values = (torch.full((pages * page, *x.shape[1:]), float("nan"), device=x.device, dtype=dtype) for x in (k, v))
        keys[rows], values[rows] = k, v
        keys, values = (x.view(pages, page, *x.shape[1:]) for x in (keys, values))
    whole = attention(q, keys, values, **batch)
    for _ in range(3):
        which = draw.integer(0, len(lens) - 1)
        first, mine = sum(lens[:which]), slice(which * each, (which + 1) * each)
        alone: dict[str, Any] = {
            "q_starts": draw.table(0, each), "kv_lens": draw.table(lens[which]), "max_q_len": each, "max_kv_len": lens[which],
        }  # fmt: skip
        label = f"sequence {which} of {len(lens)}, {each} tokens, {lens[which]} keys, {heads}, pages of {page}"
        for below in (0, 10**9):
            with _split_below(below):
                draw.compare(attention(q[mine], k[first:], v[first:], **alone), whole[mine], label)


@contextlib.contextmanager
def _split_below(items: int) -> Iterator[None]:
    """Decode tiles are computed whole (0) or in chunks (many) whatever the load, which otherwise decides."""
    keep, attention_module.SPLIT_BELOW = attention_module.SPLIT_BELOW, items
    try:
        yield
    finally:
        attention_module.SPLIT_BELOW = keep


def check_gradients(draw: Draw, dtype: torch.dtype) -> None:
    """Gradients of a sequence in a batch against the sequence alone."""
    heads = draw.pick(
        [Heads(64, 64, 4, 2), Heads(128, 128, 4, 1), Heads(192, 128, 4, 4), Heads(256, 256, 4, 2), Heads(80, 80, 2, 1),
         Heads(576, 512, 4, 1)]
    )  # fmt: skip
    window = draw.pick([None, None, 100])
    lens = [draw.integer(1, 500) for _ in range(3)]
    q, k, v = (x.requires_grad_() for x in _inputs(draw, dtype, heads, sum(lens), sum(lens)))
    starts = draw.table(0, lens[0], lens[0] + lens[1], sum(lens))
    grad = draw.normal(sum(lens), heads.queries, heads.dv, dtype=dtype)
    out = attention(q, k, v, q_starts=starts, max_q_len=max(lens), window=window)
    whole = torch.autograd.grad(out, (q, k, v), grad)
    here = slice(lens[0], lens[0] + lens[1])
    mine = [x.detach()[here].requires_grad_() for x in (q, k, v)]
    alone = torch.autograd.grad(attention(*mine, window=window), mine, grad[here])
    for name, a, b in zip(("dq", "dk", "dv"), alone, whole, strict=True):
        draw.compare(a, b[here], f"{name}, the second of lengths {lens}, {heads}, window={window}")
