"""Launching the matrix kernels: which kernel, which tile, which descriptors. `matmul` and `grouped_matmul` call this."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from .device import multiprocessors, runs_gluon
from .gemm_direct import gemm_direct_kernel
from .gemm_kernel import gemm_kernel
from .gemm_pieces import gemm_pieces_kernel
from .gemm_portable import gemm_portable_kernel
from .gemm_skinny import gemm_skinny_kernel
from .toolchain import gl, gluon_descriptor, triton
from .tuning import DIRECT, PIECES, RING, SKINNY, GemmProblem, GemmTile, choose, drips, tile_count

TREE_LEAVES = 8  # slices of K in the tree family: what tensor-parallel sizes 1, 2, 4 and 8 share
HALF = (torch.bfloat16, torch.float16)
_GL_TYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def descriptor(tensor: torch.Tensor, block: tuple[int, int]) -> Any:
    """A TMA descriptor of a two-dimensional tensor for boxes of `block` elements."""
    return gluon_descriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), _shared_layout(block, tensor.dtype))


@lru_cache(maxsize=256)
def _shared_layout(block: tuple[int, int], dtype: torch.dtype) -> Any:
    """How a box lies in shared memory. Making it takes the host twice as long as the rest of a descriptor."""
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, _GL_TYPES[dtype]))


def addressable(tensor: torch.Tensor) -> bool:
    """Whether TMA can address the matrix: aligned base, unit stride in a row, rows a multiple of 16 bytes apart."""
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0
    return aligned and tensor.stride(1) == 1 and tensor.stride(0) > 0 and tensor.numel() > 0


def problem_of(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, leaves: int, a_km: bool, b_kn: bool, experts: int
) -> GemmProblem:
    """The tuner's view of a call; B is two-dimensional here, experts stacked."""
    m, k = (a.shape[1], a.shape[0]) if a_km else (a.shape[0], a.shape[1])
    n = b.shape[1] if b_kn else b.shape[0] // max(experts, 1)
    return GemmProblem(m, n, k, a.dtype, out.dtype, leaves, a_km, b_kn, experts)


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    *,
    leaves: int = 0,
    a_km: bool = False,
    b_kn: bool = False,
    experts: int = 0,
    plan: torch.Tensor | None = None,
    plan_height: int = 0,
    tile: GemmTile | None = None,
    portable: bool = False,
) -> None:
    """out[M, N] = A[M, K] B[N, K]^T, the order of the sum as `gemm_kernel` documents.

    a: [M, K], or [K, M] with a_km. b: [N, K], or [K, N] with b_kn; with experts, their weights stacked in the first dimension.
    leaves: 0 for one chain over K, else the slices of the binary tree. plan, plan_height: the row tiles of `grouped_matmul`.
    tile: overrides the tuner's choice. portable: takes the kernel for any GPU. Shapes are the caller's to check.
    """
    leaves = 0 if leaves == 1 else leaves  # one leaf is a chain
    problem = problem_of(a, b, out, leaves=leaves, a_km=a_km, b_kn=b_kn, experts=experts)
    if problem.m == 0 or problem.n == 0:
        return
    hopper = runs_gluon(a.device) and a.dtype in HALF and addressable(a) and addressable(b) and problem.k > 0
    if hopper and not portable:
        if tile is None:
            tile = choose(problem, torch.cuda.get_device_name(a.device), multiprocessors(a.device))
            if plan_height:
                tile = fit_height(tile, plan_height)
        _launch_hopper(a, b, out, problem, tile, plan)
    else:
        _launch_portable(a, b, out, problem, plan, plan_height)


def fit_height(tile: GemmTile, height: int) -> GemmTile:
    """The tile, or one of RING with the row height that an existing plan was made for."""
    if tile.height == height and tile.engine != PIECES:
        return tile
    if height == 64:
        return GemmTile(RING, False, 64, 1, 128, 0, 64, 6, 8, tile.store)
    return GemmTile(RING, False, height // 2, 2, 128 if height == 128 else 64, 0, 64, 4, 8, tile.store)


def _launch_hopper(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, problem: GemmProblem, tile: GemmTile, plan: torch.Tensor | None
) -> None:
    if tile.engine == SKINNY:
        _launch_skinny(a, b, out, problem, tile)
        return
    if (tile.store == 1 or tile.engine == PIECES) and not addressable(out):
        tile = replace(fit_height(tile, tile.height), store=0)
        if problem.leaves and problem.k // problem.leaves % tile.depth:  # its leaves end inside a stage
            _launch_portable(a, b, out, problem, plan, 0)
            return
    m, n = problem.m, problem.n
    stride_m, stride_n = out.stride(0), out.stride(1)
    a_km, b_kn = problem.a_km, problem.b_kn
    if tile.swap:
        a, b, m, n, stride_m, stride_n, a_km, b_kn = b, a, n, m, stride_n, stride_m, b_kn, a_km
    width = -(-n // tile.width) * tile.width if tile.swap else n  # see `gemm_kernel` on N
    sizes = (m, width, n, problem.k, stride_m, stride_n)
    if tile.engine == DIRECT:
        gemm_direct_kernel[(triton.cdiv(m, tile.height) * triton.cdiv(n, tile.width),)](
            descriptor(a, (tile.height, tile.depth)), descriptor(b, (tile.cols, tile.depth)), out, *sizes, GROUP=tile.group,
            STAGES=tile.stages, ROWS=tile.height, COLS=tile.cols, DEPTH=tile.depth, LEAVES=problem.leaves,
            COALESCE=tile.store == 2, WARPS=4 * tile.consumers, num_warps=4 * tile.consumers,
            RELEASE=tile.overlap == 2, launch_pdl=tile.overlap > 0,
        )  # fmt: skip
        return
    if tile.engine == PIECES:
        _launch_pieces(a, b, out, problem, tile, (m, n))
        return
    a_desc = descriptor(a, (tile.depth, tile.rows) if a_km else (tile.rows, tile.depth))
    b_desc = descriptor(b, (tile.depth, tile.cols) if b_kn else (tile.cols, tile.depth))
    e_desc = b_desc
    if tile.extra:
        e_desc = descriptor(b, (tile.depth, tile.extra) if b_kn else (tile.extra, tile.depth))
    target = target_e = out
    if tile.store == 1:
        target = descriptor(out, (tile.rows, tile.cols))
        target_e = descriptor(out, (tile.rows, tile.extra)) if tile.extra else target
    tiles = _row_tiles(m, tile.height, problem.experts) * triton.cdiv(n, tile.width)
    programs = min(multiprocessors(out.device), tiles)
    gemm_kernel[(programs,)](
        a_desc, b_desc, e_desc, target, target_e, plan if plan is not None else out, *sizes,
        GROUPED=problem.experts > 0,
        A_KM=a_km, B_KN=b_kn, GROUP=tile.group, CONSUMERS=tile.consumers, STAGES=tile.stages, ROWS=tile.rows, COLS=tile.cols,
        EXTRA=tile.extra, DEPTH=tile.depth, LEAVES=problem.leaves, STASH=tile.stashes(problem.leaves), STORE=tile.store,
        AHEAD=1 if problem.leaves or problem.k <= tile.depth else 2, DEFER=tile.defers,
        RELEASE=tile.overlap == 2, num_warps=4, maxnreg=168, launch_pdl=tile.overlap > 0,
    )  # fmt: skip


def _launch_pieces(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, problem: GemmProblem, tile: GemmTile, sizes: tuple[int, int]
) -> None:
    """sizes: rows of a and of b, which stand for each other with tile.swap."""
    sms = multiprocessors(out.device)
    programs = min(sms, tile_count(tile, problem))
    a_box, b_box = (tile.depth, 64) if problem.a_km else (64, tile.depth), (tile.cols, tile.depth)
    descs = (descriptor(a, a_box), descriptor(b, b_box[::-1] if problem.b_kn else b_box))
    tail = problem.k // problem.leaves % tile.depth // 16 if problem.leaves else 0
    of_sums = (problem.dtype.itemsize, problem.leaves)
    gemm_pieces_kernel[(programs,)](
        *descs, out, *sizes, problem.k, out.stride(0), GROUP=tile.group, CONSUMERS=tile.consumers, STAGES=tile.stages,
        PIECE=tile.cols, COUNT=tile.pieces, LEAVES=problem.leaves, TAIL=tail, STASHED=tile.stashed(*of_sums),
        PAIRS=tile.pairs_stashed(*of_sums), DRIP=tile.pieces if drips(tile, problem, sms) else 0, A_KM=problem.a_km,
        B_KN=problem.b_kn, SWAP=tile.swap, RELEASE=tile.overlap == 2, num_warps=4, maxnreg=168, launch_pdl=tile.overlap > 0,
    )  # fmt: skip


def _launch_skinny(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, problem: GemmProblem, tile: GemmTile) -> None:
    grid = (triton.cdiv(problem.n, tile.rows), triton.cdiv(problem.m, tile.cols))
    gemm_skinny_kernel[grid](
        b, a, out, problem.m, problem.n, problem.k, b.stride(0), a.stride(0), out.stride(0), LEAVES=problem.leaves,
        ROWS=tile.rows, TOKENS=tile.cols, DEPTH=tile.depth, STAGES=tile.stages, num_warps=tile.consumers,
        num_stages=tile.stages, OVERLAP=tile.overlap > 0, launch_pdl=tile.overlap > 0,
    )  # fmt: skip


def _row_tiles(rows: int, height: int, experts: int) -> int:
    """At most this many row tiles: each expert may leave one ragged."""
    return -(-rows // height) + experts


def _launch_portable(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, problem: GemmProblem, plan: torch.Tensor | None, plan_height: int
) -> None:
    height, width, depth = 64, 64, 32
    if problem.m <= 16 and not plan_height:
        height = 16
    if plan_height:
        height = plan_height
    if problem.dtype == torch.float32 and height == 64:
        width, depth = 128, 16  # no tensor cores: what counts is how much a thread keeps in registers
    if problem.leaves and problem.k // problem.leaves % depth:
        depth = 16
    stride_am, stride_ak = (a.stride(1), a.stride(0)) if problem.a_km else (a.stride(0), a.stride(1))
    stride_bn, stride_bk = (b.stride(1), b.stride(0)) if problem.b_kn else (b.stride(0), b.stride(1))
    stride_be = b.stride(0) * (problem.k if problem.b_kn else problem.n)
    tiles = _row_tiles(problem.m, height, problem.experts) * -(-problem.n // width)
    gemm_portable_kernel[(tiles,)](
        a, b, out, plan if plan is not None else out, problem.m, problem.n, problem.k, stride_am, stride_ak, stride_be,
        stride_bn, stride_bk, out.stride(0), out.stride(1), GROUPED=problem.experts > 0, LEAVES=problem.leaves, GROUP=8,
        BM=height, BN=width, BK=depth, num_warps=4, num_stages=3,
    )  # fmt: skip
