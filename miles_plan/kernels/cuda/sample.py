"""Sampling with a counter-based generator: a token depends on its logits, its request's seed and its position alone.

Gumbel-max: the token is argmax(logit / temperature + g), g = -log(-log(u)), u from Philox-4x32-10 (Salmon et al. 2011) keyed by
the seed and counting (column, position). Ties go to the lower column. The maximum has no order, so nothing else can show.
"""

from __future__ import annotations

import torch

from . import arguments
from .device import runs_triton
from .log_prob import check_temperatures, log_softmax, row_scales
from .toolchain import jit, tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 4096
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


@jit
def sample_kernel(
    logits: tl.tensor, seeds: tl.tensor, positions: tl.tensor, best: tl.tensor, where: tl.tensor, stride: tl.tensor,
    scale: tl.tensor, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, NOISE: tl.constexpr, EACH: tl.constexpr,
) -> None:  # fmt: skip
    """Program (row, block of columns): the block's best score and its lowest column. EACH: `scale` points to one a row."""
    row = tl.program_id(0).to(tl.int64)
    if EACH:
        scale = tl.load(scale + row)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    mask = column < COLUMNS
    score = tl.load(logits + row * stride + column, mask=mask, other=float("-inf")).to(tl.float32) * scale
    if NOISE:
        position = tl.load(positions + row).to(tl.int64)
        zero = tl.zeros((BLOCK,), tl.int32)
        low = zero + (position & 0xFFFFFFFF).to(tl.int32)
        high = zero + (position >> 32).to(tl.int32)
        bits, _, _, _ = tl.philox(tl.load(seeds + row), column, low, high, zero)
        u = ((bits.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
        score = score - tl.log(-tl.log(u))
    top = tl.max(score, 0)
    tl.store(best + row * BLOCKS + block, top)
    tl.store(where + row * BLOCKS + block, tl.min(tl.where(score == top, column, COLUMNS), 0))


def sample(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> torch.Tensor:
    """One token of each row, int64 [rows].

    logits: [rows, vocabulary] bf16, fp16 or fp32, last dimension contiguous. seeds, positions: int64 [rows]; the same pair
    with the same logits gives the same token anywhere. temperature: 0 takes the best token; or one a row, positive, float32
    [rows] on the logits' device, which nobody has to read first. top_k: 0 for all. top_p: the fewest tokens
    whose probabilities (of `log_softmax`) add up to at least this, counted in units of 2^-40, whose sum is exact in any order.

    Raises ValueError naming a wrong argument.
    """
    _check(logits, seeds, positions, temperature, top_k, top_p)
    if not isinstance(temperature, torch.Tensor) and temperature > 0 and (top_p < 1.0 or 0 < top_k < logits.shape[1]):
        logits = _keep(logits, temperature, top_k, top_p)
    if not runs_triton(logits.device):
        return sample_reference(logits, seeds, positions, temperature)
    rows, columns = logits.shape
    blocks = -(-columns // BLOCK)
    best = torch.empty(rows, blocks, device=logits.device, dtype=torch.float32)
    where = torch.empty(rows, blocks, device=logits.device, dtype=torch.int32)
    if rows:
        sample_kernel[(rows, blocks)](
            logits, seeds, positions, best, where, logits.stride(0), _scale(temperature), COLUMNS=columns, BLOCKS=blocks,
            BLOCK=BLOCK, NOISE=_draws(temperature), EACH=isinstance(temperature, torch.Tensor), num_warps=4,
        )  # fmt: skip
    top = best.amax(1, keepdim=True)
    return torch.where(best == top, where, columns).amin(1).long()


def _draws(temperature: float | torch.Tensor) -> bool:
    """Whether chance has a say."""
    return isinstance(temperature, torch.Tensor) or temperature > 0


def _scale(temperature: float | torch.Tensor) -> float | torch.Tensor:
    """What rows' logits are multiplied by, as for their log-probabilities; the best token is the best at any temperature."""
    return row_scales(temperature) if _draws(temperature) else 1.0


def _check(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int,
    top_p: float,
) -> None:
    arguments.require_dims("logits", logits, 2, "[rows, vocabulary]")
    arguments.require_dtype("logits", logits, DTYPES)
    arguments.require_contiguous_rows("logits", logits)
    for name, tensor in (("seeds", seeds), ("positions", positions)):
        arguments.require_dtype(name, tensor, (torch.int64,))
        arguments.require_shape(name, tensor, (logits.shape[0],), "[rows]")
    arguments.require_same_device(logits=logits, seeds=seeds, positions=positions)
    if isinstance(temperature, torch.Tensor):
        check_temperatures(logits, temperature)
        if top_p < 1.0 or top_k:
            raise ValueError("temperature is a tensor with top_k or top_p; allowed: one number for all rows")
    elif not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; allowed: 0 or more")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; allowed: 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; allowed: above 0, at most 1")


def _keep(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Logits with -inf for every token outside top_k and top_p; equal logits rank by column."""
    ranked = torch.sort(logits.float(), dim=-1, descending=True, stable=True).indices
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if 0 < top_k < logits.shape[1]:
        kept[:, top_k:] = False
    if top_p < 1.0:
        units = (torch.exp(log_softmax(logits, temperature=temperature).double()) * 2.0**40).long().gather(1, ranked)
        kept &= torch.cumsum(units, 1) - units < int(top_p * 2**40)
    mask = torch.zeros_like(kept).scatter(1, ranked, kept)
    return logits.masked_fill(~mask, float("-inf"))


def philox(seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor) -> torch.Tensor:
    """The first of Philox-4x32-10's four words, in int64 arithmetic; counters are unsigned 32-bit values in int64."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _wide_product(_MULTIPLIERS[0], c0)
        high1, low1 = _wide_product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0


def _wide_product(factor: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a 32 x 32 bit product, by halves so that int64 does not overflow."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return (high >> 16) & _MASK, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def sample_reference(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    """The same in plain torch."""
    score = logits.float() * torch.as_tensor(_scale(temperature), dtype=torch.float32, device=logits.device).view(-1, 1)
    if _draws(temperature):
        column = torch.arange(logits.shape[1], device=logits.device)[None, :].expand(logits.shape)
        position = positions[:, None].expand(logits.shape)
        zero = torch.zeros_like(column)
        bits = philox(seeds[:, None].expand(logits.shape), column, position & _MASK, (position >> 32) & _MASK, zero)
        u = ((bits >> 8).float() + 0.5) * 2.0**-24
        score = score - torch.log(-torch.log(u))
    top = score.amax(1, keepdim=True)
    column = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(score == top, column, logits.shape[1]).amin(1)
