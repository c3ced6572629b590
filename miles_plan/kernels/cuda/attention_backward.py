"""Gradients of attention, deterministic: no atomics, every sum in a stated order.

FlashAttention-2 (arXiv 2307.08691, section 3.1.1), as two kernels. dQ of a row sums over key blocks of 64 in ascending order;
dK and dV of a key sum over the heads of its group in order and, within a head, over query blocks of 64 in ascending order. (Of 32
where a head size is above 256: four tiles of 64 such rows would not fit shared memory.) Both recompute the weights from the
log-sum-exp (in units of log2) that the forward kernel left, so a sequence's gradients depend on nothing but the sequence.
"""

from __future__ import annotations

import torch

from .toolchain import jit, tl

BLOCK = 64
BLOCK_OF_WIDE_HEADS = 32
WIDE_HEAD = 256
DELTA_ROWS = 32


@jit
def _rows(
    x: tl.tensor, first: tl.tensor, index: tl.tensor, length: tl.tensor, stride: tl.tensor, D: tl.constexpr, D_PAD: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Rows `first + index` of a packed tensor, zeros past `length` and past column D."""
    d = tl.arange(0, D_PAD)
    offset = (first + index).to(tl.int64) * stride
    return tl.load(x + offset[:, None] + d[None, :], mask=(index < length)[:, None] & (d < D)[None, :], other=0.0)


@jit
def _weights(
    q: tl.tensor, k: tl.tensor, lse: tl.tensor, row: tl.tensor, col: tl.tensor, q_len: tl.tensor, kv_len: tl.tensor,
    shift: tl.tensor, window: tl.tensor, scale_log2: tl.tensor, CAUSAL: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Normalised weights p[row, col], zero where the row may not look."""
    s = tl.dot(q, tl.trans(k))
    p = tl.exp2(tl.fma(s, scale_log2, -lse[:, None]))
    place = row + shift
    seen = (row < q_len)[:, None] & (col < kv_len)[None, :] & (col[None, :] > (place - window)[:, None])
    if CAUSAL:
        seen = seen & (col[None, :] <= place[:, None])
    return tl.where(seen, p, 0.0)


@jit(do_not_specialize=["rows"])
def delta_kernel(
    out: tl.tensor, grad: tl.tensor, delta: tl.tensor, rows: tl.tensor, stride_token: tl.tensor, stride_head: tl.tensor,
    grad_stride_token: tl.tensor, grad_stride_head: tl.tensor, HEADS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """delta[token, head] = sum_d out * grad, ROWS pairs of token and head a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    d = tl.arange(0, DV_PAD)
    there = (row < rows)[:, None]
    if DV != DV_PAD:
        there = there & (d < DV)[None, :]
    o = tl.load(out + (token * stride_token + head * stride_head)[:, None] + d[None, :], mask=there, other=0.0)
    g = tl.load(grad + (token * grad_stride_token + head * grad_stride_head)[:, None] + d[None, :], mask=there, other=0.0)
    tl.store(delta + row, tl.sum(o.to(tl.float32) * g.to(tl.float32), axis=1), mask=row < rows)


@jit(do_not_specialize=["TILES", "window"])
def query_gradient_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, grad: tl.tensor, lse: tl.tensor, delta: tl.tensor, dq: tl.tensor,
    q_starts: tl.tensor, kv_starts: tl.tensor, kv_lens: tl.tensor, HEADS: tl.tensor, TILES: tl.tensor,
    q_stride: tl.tensor, q_head: tl.tensor, k_stride: tl.tensor, k_head: tl.tensor, v_stride: tl.tensor, v_head: tl.tensor,
    g_stride: tl.tensor, g_head: tl.tensor, dq_stride: tl.tensor, dq_head: tl.tensor, scale: tl.tensor,
    scale_log2: tl.tensor, window: tl.tensor,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr,
    DV_PAD: tl.constexpr, B: tl.constexpr,
) -> None:  # fmt: skip
    """Program (sequence x query tile, head): dQ of B rows."""
    tile = tl.program_id(0) % TILES
    seq = tl.program_id(0) // TILES
    head = tl.program_id(1)
    q_start = tl.load(q_starts + seq)
    q_len = tl.load(q_starts + seq + 1) - q_start
    kv_start = tl.load(kv_starts + seq)
    kv_len = tl.load(kv_lens + seq)
    row = tile * B + tl.arange(0, B)
    if tile * B < q_len:
        shift = kv_len - q_len
        q_tile = _rows(q + head * q_head, q_start, row, q_len, q_stride, D, D_PAD)
        g_tile = _rows(grad + head * g_head, q_start, row, q_len, g_stride, DV, DV_PAD)
        at = (q_start + row).to(tl.int64) * HEADS + head
        lse_row = tl.load(lse + at, mask=row < q_len, other=0.0)
        delta_row = tl.load(delta + at, mask=row < q_len, other=0.0)
        hi = kv_len
        if CAUSAL:
            hi = tl.minimum(kv_len, (tile + 1) * B + shift)
        lo = tl.maximum(tile * B + shift - window + 1, 0) // B * B
        acc = tl.zeros((B, D_PAD), tl.float32)
        for col0 in range(lo, hi, B):
            col = col0 + tl.arange(0, B)
            k_tile = _rows(k + (head // GROUP) * k_head, kv_start, col, kv_len, k_stride, D, D_PAD)
            v_tile = _rows(v + (head // GROUP) * v_head, kv_start, col, kv_len, v_stride, DV, DV_PAD)
            p = _weights(q_tile, k_tile, lse_row, row, col, q_len, kv_len, shift, window, scale_log2, CAUSAL)
            dp = tl.dot(g_tile, tl.trans(v_tile))
            ds = p * (dp - delta_row[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc)
        d = tl.arange(0, D_PAD)
        out = dq + (q_start + row).to(tl.int64)[:, None] * dq_stride + head * dq_head + d[None, :]
        tl.store(out, (acc * scale).to(dq.dtype.element_ty), mask=(row < q_len)[:, None] & (d < D)[None, :])


@jit(do_not_specialize=["TILES", "window"])
def key_value_gradient_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, grad: tl.tensor, lse: tl.tensor, delta: tl.tensor, dk: tl.tensor,
    dv: tl.tensor, q_starts: tl.tensor, kv_starts: tl.tensor, kv_lens: tl.tensor, HEADS: tl.tensor, TILES: tl.tensor,
    q_stride: tl.tensor, q_head: tl.tensor, k_stride: tl.tensor, k_head: tl.tensor, v_stride: tl.tensor, v_head: tl.tensor,
    g_stride: tl.tensor, g_head: tl.tensor, dk_stride: tl.tensor, dk_head: tl.tensor, dv_stride: tl.tensor,
    dv_head: tl.tensor, scale: tl.tensor, scale_log2: tl.tensor, window: tl.tensor,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr,
    DV_PAD: tl.constexpr, B: tl.constexpr,
) -> None:  # fmt: skip
    """Program (sequence x key tile, key head): dK and dV of B keys."""
    tile = tl.program_id(0) % TILES
    seq = tl.program_id(0) // TILES
    kv_head = tl.program_id(1)
    q_start = tl.load(q_starts + seq)
    q_len = tl.load(q_starts + seq + 1) - q_start
    kv_start = tl.load(kv_starts + seq)
    kv_len = tl.load(kv_lens + seq)
    col = tile * B + tl.arange(0, B)
    if tile * B < kv_len:
        shift = kv_len - q_len
        k_tile = _rows(k + kv_head * k_head, kv_start, col, kv_len, k_stride, D, D_PAD)
        v_tile = _rows(v + kv_head * v_head, kv_start, col, kv_len, v_stride, DV, DV_PAD)
        k_acc = tl.zeros((B, D_PAD), tl.float32)
        v_acc = tl.zeros((B, DV_PAD), tl.float32)
        lo = 0
        if CAUSAL:
            lo = tl.maximum(tile * B - shift, 0) // B * B
        hi = tl.minimum(q_len, (tile + 1) * B - 1 + window - shift)
        for g in range(GROUP):
            head = kv_head * GROUP + g
            for row0 in range(lo, hi, B):
                row = row0 + tl.arange(0, B)
                q_tile = _rows(q + head * q_head, q_start, row, q_len, q_stride, D, D_PAD)
                g_tile = _rows(grad + head * g_head, q_start, row, q_len, g_stride, DV, DV_PAD)
                at = (q_start + row).to(tl.int64) * HEADS + head
                lse_row = tl.load(lse + at, mask=row < q_len, other=0.0)
                delta_row = tl.load(delta + at, mask=row < q_len, other=0.0)
                p = _weights(q_tile, k_tile, lse_row, row, col, q_len, kv_len, shift, window, scale_log2, CAUSAL)
                v_acc = tl.dot(tl.trans(p.to(g_tile.dtype)), g_tile, v_acc)
                dp = tl.dot(g_tile, tl.trans(v_tile))
                ds = p * (dp - delta_row[:, None])
                k_acc = tl.dot(tl.trans(ds.to(q_tile.dtype)), q_tile, k_acc)
        d = tl.arange(0, D_PAD)
        e = tl.arange(0, DV_PAD)
        there = (col < kv_len)[:, None]
        base = (kv_start + col).to(tl.int64)[:, None]
        dk_at = dk + base * dk_stride + kv_head * dk_head + d[None, :]
        dv_at = dv + base * dv_stride + kv_head * dv_head + e[None, :]
        tl.store(dk_at, (k_acc * scale).to(dk.dtype.element_ty), mask=there & (d < D)[None, :])
        tl.store(dv_at, v_acc.to(dv.dtype.element_ty), mask=there & (e < DV)[None, :])


def _pad(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def attention_gradients(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse_log2: torch.Tensor,
    q_starts: torch.Tensor, kv_starts: torch.Tensor, kv_lens: torch.Tensor, max_q_len: int, max_kv_len: int,
    causal: bool, window: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dQ, dK, dV of packed attention, each in its input's dtype. lse_log2: [tokens, heads] float32, from the forward kernel."""
    tokens, heads, d = q.shape
    kv_heads, dv_size = k.shape[1], v.shape[2]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta = torch.empty(tokens, heads, device=q.device, dtype=torch.float32)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    pads = {"D": d, "D_PAD": _pad(d), "DV": dv_size, "DV_PAD": _pad(dv_size)}
    delta_kernel[(-(-tokens * heads // DELTA_ROWS),)](
        out, grad, delta, tokens * heads, out.stride(0), out.stride(1), grad.stride(0), grad.stride(1), HEADS=heads, DV=dv_size,
        DV_PAD=pads["DV_PAD"], ROWS=DELTA_ROWS, num_warps=4,
    )  # fmt: skip
    warps = 4 if pads["D_PAD"] <= 128 else 8
    scale_log2 = scale * 1.4426950408889634
    block = BLOCK if max(d, dv_size) <= WIDE_HEAD else BLOCK_OF_WIDE_HEADS
    shared = {"CAUSAL": causal, "GROUP": heads // kv_heads, "B": block, "num_warps": warps, "num_stages": 2, **pads}
    seqs = kv_lens.numel()
    q_tiles, kv_tiles = -(-max_q_len // block), -(-max_kv_len // block)
    places = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad.stride()[:2])
    query_gradient_kernel[(seqs * q_tiles, heads)](
        q, k, v, grad, lse_log2, delta, dq, q_starts, kv_starts, kv_lens, heads, q_tiles, *places, *dq.stride()[:2],
        scale, scale_log2, window, **shared,
    )  # fmt: skip
    key_value_gradient_kernel[(seqs * kv_tiles, kv_heads)](
        q, k, v, grad, lse_log2, delta, dk, dv, q_starts, kv_starts, kv_lens, heads, kv_tiles, *places, *dk.stride()[:2],
        *dv.stride()[:2], scale, scale_log2, window, **shared,
    )  # fmt: skip
    return dq, dk, dv
