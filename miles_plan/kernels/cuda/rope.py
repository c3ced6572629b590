"""Rotary position embedding for queries and keys at once, with the per-head norm that Qwen3 puts before it.

Su et al. 2021 (arXiv 2104.09864), the half-rotation form of GPT-NeoX. Elementwise but for the optional norm over one head, so
nothing depends on the batch; the products are explicit fused multiply-adds, so no compiler can contract them two ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import arguments
from .device import runs_triton, steady
from .overlap import begin_alone, overlap, ready, release
from .toolchain import jit, tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE_HEADS = 8


@dataclass(frozen=True)
class CacheRows:
    """Where `rope` also puts the tokens' keys and values: rows `slots` of a cache.

    keys, values: [slots of the cache, kv_heads, D], slots of any stride, each contiguous. v: [tokens, kv_heads, D], the new
    values, last dimension contiguous. slots: int32 or int64 [tokens].
    """

    keys: torch.Tensor
    values: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor


@jit
def _rotate(
    x: tl.tensor, out: tl.tensor, cache: tl.tensor, x_head: tl.tensor, cos: tl.tensor, sin: tl.tensor, weight: tl.tensor,
    eps: tl.tensor, position_at: tl.tensor, slot_at: tl.tensor, table_stride: tl.tensor, cache_stride: tl.tensor,
    first: tl.tensor, heads: tl.tensor, TILE: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, NORM: tl.constexpr,
    BACK: tl.constexpr, CACHE: tl.constexpr, OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """TILE heads of one token from head `first`: optionally normalised, then rotated; stored a second time with CACHE.

    What needs no other value is loaded before what needs the position.
    """
    head = first + tl.arange(0, TILE)[:, None]
    d = tl.arange(0, HALF_PAD)
    mask = (head < heads) & (d < HALF)[None, :]
    at = head * x_head + d[None, :]
    ready(x + first * x_head, OVERLAP)
    ready(position_at, OVERLAP)
    begin_alone(OVERLAP)
    position = tl.load(position_at).to(tl.int64)
    if CACHE:
        cache += tl.load(slot_at).to(tl.int64) * cache_stride
    x1 = tl.load(x + at, mask=mask, other=0.0)
    x2 = tl.load(x + at + HALF, mask=mask, other=0.0)
    if NORM:  # one dimension: of two, the compiler would lay the heads out like the weights, through shared memory
        w1 = tl.load(weight + d, mask=d < HALF, other=0.0)
        w2 = tl.load(weight + HALF + d, mask=d < HALF, other=0.0)
    release(OVERLAP)
    c = tl.load(cos + position * table_stride + d, mask=d < HALF, other=0.0)
    s = tl.load(sin + position * table_stride + d, mask=d < HALF, other=0.0)
    if BACK:
        s = -s
    c = c[None, :]
    s = s[None, :]
    x1 = x1.to(tl.float32)
    x2 = x2.to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt_rn(tl.sum(tl.fma(x1, x1, x2 * x2), axis=1) / (2 * HALF) + eps)
        x1 = (x1 * scale[:, None] * w1.to(tl.float32)[None, :]).to(x.dtype.element_ty).to(tl.float32)
        x2 = (x2 * scale[:, None] * w2.to(tl.float32)[None, :]).to(x.dtype.element_ty).to(tl.float32)
    y1 = tl.fma(x1, c, -(x2 * s)).to(out.dtype.element_ty)
    y2 = tl.fma(x2, c, x1 * s).to(out.dtype.element_ty)
    to = head * (2 * HALF) + d[None, :]
    tl.store(out + to, y1, mask=mask)
    tl.store(out + to + HALF, y2, mask=mask)
    if CACHE:
        tl.store(cache + to, y1, mask=mask)
        tl.store(cache + to + HALF, y2, mask=mask)


@jit
def _copy_heads(
    x: tl.tensor, cache: tl.tensor, x_head: tl.tensor, slot_at: tl.tensor, cache_stride: tl.tensor, first: tl.tensor,
    heads: tl.tensor, TILE: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """TILE heads of one token from head `first`, to its slot."""
    head = first + tl.arange(0, TILE)[:, None]
    d = tl.arange(0, 2 * HALF_PAD)[None, :]
    mask = (head < heads) & (d < 2 * HALF)
    ready(x + first * x_head, OVERLAP)
    begin_alone(OVERLAP)
    cache += tl.load(slot_at).to(tl.int64) * cache_stride
    values = tl.load(x + head * x_head + d, mask=mask, other=0.0)
    release(OVERLAP)
    tl.store(cache + head * (2 * HALF) + d, values, mask=mask)


@jit(do_not_specialize=["q_heads", "k_heads"])
def rope_kernel(
    q: tl.tensor, k: tl.tensor, q_out: tl.tensor, k_out: tl.tensor, cos: tl.tensor, sin: tl.tensor, positions: tl.tensor,
    q_weight: tl.tensor, k_weight: tl.tensor, eps: tl.tensor, q_token: tl.tensor, q_head: tl.tensor, k_token: tl.tensor,
    k_head: tl.tensor, table_stride: tl.tensor, q_heads: tl.tensor, k_heads: tl.tensor,
    v: tl.tensor, slots: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, v_token: tl.tensor, v_head: tl.tensor,
    k_slot: tl.tensor, v_slot: tl.tensor,
    TILE: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, NORM: tl.constexpr, BACK: tl.constexpr,
    CACHE: tl.constexpr, OVERLAP: tl.constexpr,
) -> None:  # fmt: skip
    """Program (token, tile of heads: first queries', then keys', with CACHE then values'). BACK rotates the other way, which is
    the gradient.

    The tile has one shape whatever the number of heads, so a head's norm has the same bits on any number of ranks.
    """
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    position_at = positions + token
    slot_at = slots + token
    q_tiles = tl.cdiv(q_heads, TILE)
    k_tiles = tl.cdiv(k_heads, TILE)
    if tile < q_tiles:
        _rotate(
            q + token * q_token, q_out + token * q_heads * 2 * HALF, q_out, q_head, cos, sin, q_weight, eps, position_at, slot_at,
            table_stride, 0, tile * TILE, q_heads, TILE, HALF, HALF_PAD, NORM, BACK, False, OVERLAP,
        )  # fmt: skip
    elif tile < q_tiles + k_tiles:
        _rotate(
            k + token * k_token, k_out + token * k_heads * 2 * HALF, k_cache, k_head, cos, sin, k_weight, eps, position_at, slot_at,
            table_stride, k_slot, (tile - q_tiles) * TILE, k_heads, TILE, HALF, HALF_PAD, NORM, BACK, CACHE, OVERLAP,
        )  # fmt: skip
    elif CACHE:
        _copy_heads(
            v + token * v_token, v_cache, v_head, slot_at, v_slot, (tile - q_tiles - k_tiles) * TILE, k_heads, TILE, HALF, HALF_PAD,
            OVERLAP,
        )  # fmt: skip


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    cache: CacheRows | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions; returns new contiguous tensors.

    q: [tokens, heads, D], k: [tokens, kv_heads, D], bf16, fp16 or fp32, D even, last dimension contiguous.
    cos, sin: float32 [longest, D / 2] tables of the angles. positions: int32 or int64 [tokens].
    q_norm, k_norm: [D] weights of a root-mean-square norm over each head, applied first and rounded to q's dtype; both or
        neither; without gradients (train with `rms_norm` and then `rope`).
    cache: write the rotated keys and the new values there too; without gradients.

    Elementwise in float32: y1 = fma(x1, cos, -(x2 sin)), y2 = fma(x2, cos, x1 sin), rounded once. Differentiable in q and k.
    Raises ValueError naming a wrong argument.
    """
    _check(q, k, cos, sin, positions, q_norm, k_norm)
    if cache is not None:
        _check_cache(k, cache)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        if q_norm is not None:
            raise ValueError("q_norm is given with inputs that require gradients; allowed: rms_norm() and then rope()")
        if cache is not None:
            raise ValueError("cache is given with inputs that require gradients; allowed: a cache under torch.no_grad()")
        return _Rope.apply(q, k, cos, sin, positions)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply is untyped
    return _rotated(q, k, cos, sin, positions, q_norm, k_norm, eps, back=False, cache=cache)


def rope_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """One of the two tensors in plain torch."""
    half = x.shape[-1] // 2
    wide = x.float()
    if weight is not None:
        scale = 1.0 / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)
        wide = (wide * scale * weight.float()).to(x.dtype).float()
    x1, x2 = wide[..., :half].double(), wide[..., half:].double()
    c, s = (t[positions.long()][:, None, :] for t in (cos, sin))
    y1 = (x1 * c.double() - (x2.float() * s).double()).float()
    y2 = (x2 * c.double() + (x1.float() * s).double()).float()
    return torch.cat((y1, y2), -1).to(x.dtype)


def _check(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
    q_norm: torch.Tensor | None, k_norm: torch.Tensor | None,
) -> None:  # fmt: skip
    arguments.require_same_device(q=q, k=k, cos=cos, sin=sin, positions=positions, q_norm=q_norm, k_norm=k_norm)
    for name, tensor in (("q", q), ("k", k)):
        arguments.require_dims(name, tensor, 3, "[tokens, heads, D]")
        arguments.require_dtype(name, tensor, DTYPES)
        arguments.require_contiguous_rows(name, tensor)
    arguments.require_dtype("k", k, (q.dtype,))
    if q.shape[-1] % 2:
        raise ValueError(f"q has head size {q.shape[-1]}; allowed: an even number")
    arguments.require_shape("k", k, (q.shape[0], k.shape[1], q.shape[2]), "[q's tokens, kv_heads, q's D]")
    for name, table in (("cos", cos), ("sin", sin)):
        arguments.require_dtype(name, table, (torch.float32,))
        arguments.require_shape(name, table, (cos.shape[0], q.shape[-1] // 2), "[longest, D / 2]")
        arguments.require_contiguous(name, table)
    arguments.require_dtype("positions", positions, (torch.int32, torch.int64))
    arguments.require_shape("positions", positions, (q.shape[0],), "[tokens]")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("only one of q_norm and k_norm is given; allowed: both or neither")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            arguments.require_dtype(name, weight, DTYPES)
            arguments.require_shape(name, weight, (q.shape[-1],), "[D]")


def _check_cache(k: torch.Tensor, cache: CacheRows) -> None:
    named = {"cache.keys": cache.keys, "cache.values": cache.values, "cache.v": cache.v, "cache.slots": cache.slots}
    arguments.require_same_device(k=k, **named)
    for name in ("cache.keys", "cache.values", "cache.v"):
        arguments.require_dtype(name, named[name], (k.dtype,))
        arguments.require_shape(name, named[name], (named[name].shape[0], *k.shape[1:]), "[any, kv_heads, D]")
        arguments.require_contiguous_rows(name, named[name])
    for name in ("cache.keys", "cache.values"):
        if named[name].shape[0]:
            arguments.require_contiguous(f"{name}[0]", named[name][0])
    arguments.require_shape("cache.v", cache.v, k.shape, "k's shape")
    arguments.require_dtype("cache.slots", cache.slots, (torch.int32, torch.int64))
    arguments.require_shape("cache.slots", cache.slots, (k.shape[0],), "[tokens]")
    arguments.require_contiguous("cache.slots", cache.slots)


def _rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
    q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, *, back: bool, cache: CacheRows | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    if not runs_triton(q.device):
        sine = -sin if back else sin
        q_out, k_out = (rope_reference(x, cos, sine, positions, weight, eps) for x, weight in ((q, q_norm), (k, k_norm)))
        if cache is not None:
            cache.keys[cache.slots.long()], cache.values[cache.slots.long()] = k_out, cache.v
        return q_out, k_out
    q, k = steady(q), steady(k)
    q_out, k_out = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k))
    half = q.shape[-1] // 2
    if q.shape[0]:
        to = CacheRows(k_out, k_out, k, positions) if cache is None else cache
        q_tiles, k_tiles = (-(-x.shape[1] // TILE_HEADS) for x in (q, k))
        rope_kernel[(q.shape[0], q_tiles + (1 if cache is None else 2) * k_tiles)](
            q, k, q_out, k_out, cos, sin, positions, q if q_norm is None else q_norm, k if k_norm is None else k_norm, eps,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0), q.shape[1], k.shape[1],
            to.v, to.slots, to.keys, to.values, to.v.stride(0), to.v.stride(1), to.keys.stride(0), to.values.stride(0),
            TILE=TILE_HEADS, HALF=half, HALF_PAD=1 << (half - 1).bit_length(), NORM=q_norm is not None, BACK=back,
            CACHE=cache is not None, num_warps=1, **overlap(q.device),
        )  # fmt: skip
    return q_out, k_out


class _Rope(torch.autograd.Function):
    """rope whose gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin, positions)
        return _rotated(q, k, cos, sin, positions, None, None, 0.0, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        dq, dk = (g if g.stride(-1) == 1 else g.contiguous() for g in grads)
        dq, dk = _rotated(dq, dk, cos, sin, positions, None, None, 0.0, back=True)
        return dq, dk, None, None, None
