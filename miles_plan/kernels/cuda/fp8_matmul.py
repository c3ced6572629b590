"""Block-scaled FP8 matrix products, plain and grouped, whose bits do not depend on the batch.

`fp8_kernel` states the scheme and the order of the sum. On Hopper the bits are the FP8 tensor core's; elsewhere the blocks are
multiplied in fp16, in the same order, and are that GPU's own.
"""

from __future__ import annotations

import torch

from . import arguments
from .device import multiprocessors, runs_gluon, runs_triton
from .fp8_kernel import LARGEST_E4M3, SCALE_BLOCK, fp8_kernel, fp8_portable_kernel, quantize_kernel
from .grouped_matmul import plan_tiles
from .overlap import overlap, overlaps
from .tensor_core import mma_chain
from .toolchain import gl, gluon_descriptor

VALUES = (torch.float8_e4m3fn,)
SOURCES = (torch.bfloat16, torch.float16, torch.float32)
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, K] as e4m3 [rows, K] and float32 scales [rows, K / 128], K a multiple of 128.

    A block's scale is its largest magnitude over 448, or 1 for a block of zeros; nothing looks past its block.
    """
    arguments.require_dims("x", x, 2, "[rows, K]")
    arguments.require_dtype("x", x, SOURCES)
    arguments.require_contiguous_rows("x", x)
    rows, k = x.shape
    _require_blocks("x", k)
    if not runs_triton(x.device):
        return _quantize_reference(x)
    values = torch.empty(rows, k, device=x.device, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, k // SCALE_BLOCK, device=x.device, dtype=torch.float32)
    if values.numel():
        tile = 8
        blocks = k // SCALE_BLOCK
        quantize_kernel[(rows, -(-blocks // tile))](
            x, values, scales, x.stride(0), BLOCKS=blocks, TILE=tile, num_warps=2, **overlap(x.device)
        )
    return values, scales


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [..., N, K] as e4m3 and float32 scales [..., ceil(N / 128), K / 128], one a 128 x 128 block, by the same rule."""
    arguments.require_dtype("weight", weight, SOURCES)
    if weight.dim() not in (2, 3):
        raise ValueError(f"weight has shape {list(weight.shape)}; allowed: [N, K] or [experts, N, K]")
    *lead, n, k = weight.shape
    _require_blocks("weight", k)
    row_blocks = -(-n // SCALE_BLOCK)
    padded = torch.zeros(*lead, row_blocks * SCALE_BLOCK, k, device=weight.device)
    padded[..., :n, :] = weight.float()
    blocks = padded.view(*lead, row_blocks, SCALE_BLOCK, k // SCALE_BLOCK, SCALE_BLOCK)
    scales = _scales_of(blocks.abs().amax((-3, -1)))
    values = (blocks / scales[..., :, None, :, None]).view(padded.shape)[..., :n, :]
    return values.to(torch.float8_e4m3fn).contiguous(), scales


def fp8_matmul(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor,
    *, out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """(x_scale x) @ (weight_scale weight).T, [rows, N] in `out_dtype` (bf16, fp16 or float32); forward only.

    x: e4m3 [rows, K], weight: e4m3 [N, K], contiguous, K a multiple of 128, N of 16. x_scale: float32 [rows, K / 128].
    weight_scale: float32 [ceil(N / 128), K / 128]. Raises ValueError naming a wrong argument.
    """
    arguments.require_dims("weight", weight, 2, "[N, K]")
    _check(x, x_scale, weight[None], weight_scale[None], out_dtype)
    return _run(x, x_scale, weight[None], weight_scale[None], None, out_dtype)


def fp8_grouped_matmul(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, counts: torch.Tensor,
    *, out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """`fp8_matmul` for rows sorted by expert: weight [experts, N, K], its scales likewise, counts as `grouped_matmul`'s."""
    arguments.require_dims("weight", weight, 3, "[experts, N, K]")
    _check(x, x_scale, weight, weight_scale, out_dtype)
    arguments.require_dtype("counts", counts, (torch.int32,))
    arguments.require_shape("counts", counts, (weight.shape[0],), "[experts]")
    arguments.require_same_device(x=x, counts=counts)
    return _run(x, x_scale, weight, weight_scale, counts, out_dtype)


def fp8_matmul_reference(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """The float32 accumulator's bits on Hopper, in plain torch; one weight."""
    total = torch.zeros(x.shape[0], weight.shape[0], device=x.device)
    columns = torch.arange(weight.shape[0], device=x.device) // SCALE_BLOCK
    for block in range(x.shape[1] // SCALE_BLOCK):
        k = slice(block * SCALE_BLOCK, (block + 1) * SCALE_BLOCK)
        part = mma_chain(x[:, k], weight[:, k])
        scale = x_scale[:, block, None] * weight_scale[columns, block][None, :]
        total = (part.double() * scale.double() + total.double()).float()
    return total


def _require_blocks(name: str, k: int) -> None:
    if k % SCALE_BLOCK:
        raise ValueError(f"{name} has K = {k}; allowed: a multiple of {SCALE_BLOCK}")


def _scales_of(largest: torch.Tensor) -> torch.Tensor:
    return torch.where(largest > 0, largest / LARGEST_E4M3, 1.0)


def _quantize_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = x.float().view(x.shape[0], x.shape[1] // SCALE_BLOCK, SCALE_BLOCK)
    scales = _scales_of(blocks.abs().amax(-1))
    return (blocks / scales[..., None]).view(x.shape).to(torch.float8_e4m3fn), scales


def _check(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype
) -> None:
    arguments.require_dims("x", x, 2, "[rows, K]")
    for name, tensor in (("x", x), ("weight", weight)):
        arguments.require_dtype(name, tensor, VALUES)
        arguments.require_contiguous(name, tensor)
    for name, tensor in (("x_scale", x_scale), ("weight_scale", weight_scale)):
        arguments.require_dtype(name, tensor, (torch.float32,))
    arguments.require_same_device(x=x, x_scale=x_scale, weight=weight, weight_scale=weight_scale)
    experts, n, k = weight.shape
    if x.shape[1] != k:
        raise ValueError(f"x has K = {x.shape[1]}; allowed: weight's K, {k}")
    _require_blocks("x", k)
    if n % 16:
        raise ValueError(f"weight has N = {n}; allowed: a multiple of 16")
    arguments.require_shape("x_scale", x_scale, (x.shape[0], k // SCALE_BLOCK), "[rows, K / 128]")
    shape = (experts, -(-n // SCALE_BLOCK), k // SCALE_BLOCK)
    arguments.require_shape("weight_scale", weight_scale, shape, "[experts,] [ceil(N / 128), K / 128]")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype is {out_dtype}; allowed: torch.bfloat16, torch.float16, torch.float32")


def _tile(rows: int, n: int, experts: int, sms: int) -> tuple[bool, int, int, int]:
    """Whether the weights take the rows, warp groups, columns and stages: wide tiles once they fill the device."""
    if not experts and rows <= 64 and n % 64 == 0:
        cols = min(64, max(8, 1 << (rows - 1).bit_length()))
        while cols > 16 and n // 64 * -(-rows // cols) * 4 < 3 * sms:  # reading the weights twice from L2 beats idling
            cols //= 2
        return True, 1, cols, 12
    if rows > 64 * max(experts, 1) and -(-rows // 128) * -(-n // 128) * 2 >= sms:
        return False, 2, 128, 6
    for cols, stages in ((128, 8), (64, 12), (32, 16)):
        if -(-rows // 64) * -(-n // cols) * min(max(experts, 1), rows) >= sms or cols == 32:
            return False, 1, cols, stages
    raise AssertionError("the last width always returns")


def _run(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, counts: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    experts, n, k = weight.shape
    if not runs_triton(x.device):
        sizes = [x.shape[0]] if counts is None else counts.tolist()
        split = zip(torch.split(x, sizes), torch.split(x_scale, sizes), strict=True)
        parts = [fp8_matmul_reference(v, s, weight[e], weight_scale[e]) for e, (v, s) in enumerate(split)]
        return torch.cat(parts).to(out_dtype)
    out = torch.empty(x.shape[0], n, device=x.device, dtype=out_dtype)
    if x.shape[0] == 0:
        return out
    grouped = counts is not None
    hopper = runs_gluon(x.device)
    sms = multiprocessors(x.device)
    swap, consumers, cols, stages = False, 1, 64, 1
    if hopper:
        swap, consumers, cols, stages = _tile(x.shape[0], n, experts if grouped else 0, sms)
    height = 64 * consumers
    plan = out if counts is None else plan_tiles(counts, x.shape[0], height)
    tiles = (-(-x.shape[0] // height) + (experts if grouped else 0)) * -(-n // cols)
    strides = (*x_scale.stride(), *weight_scale.stride())
    stacked = weight.view(-1, k)
    if not hopper:
        fp8_portable_kernel[(tiles,)](
            x, weight, out, plan, x_scale, weight_scale, *strides, x.shape[0], n, k, x.stride(0), out.stride(0),
            GROUPED=grouped, COLS=cols, num_warps=4,
        )  # fmt: skip
        return out
    a, b, m, width = (stacked, x, n, -(-x.shape[0] // cols) * cols) if swap else (x, stacked, x.shape[0], n)
    n_end = x.shape[0] if swap else n
    if swap:
        tiles = n // 64 * (width // cols)
    fp8_kernel[(min(sms, tiles),)](
        _descriptor(a, 64), _descriptor(b, cols), out, plan, x_scale, weight_scale, *strides, m, width, n_end, k,
        *(reversed(out.stride()) if swap else out.stride()), GROUPED=grouped, GROUP=8, CONSUMERS=consumers, STAGES=stages,
        COLS=cols, COALESCE=not swap and cols >= 64 and out_dtype != torch.float32, SWAP=swap, num_warps=4, maxnreg=168, launch_pdl=overlaps(out.device),
    )  # fmt: skip
    return out


def _descriptor(tensor: torch.Tensor, rows: int) -> object:
    layout = gl.NVMMASharedLayout.get_default_for([rows, SCALE_BLOCK], gl.float8e4nv)
    return gluon_descriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, SCALE_BLOCK], layout)
