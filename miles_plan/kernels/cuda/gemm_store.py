"""How the matrix kernels write a finished tile."""

from __future__ import annotations

from .toolchain import fence_async_shared, gl, gluon_jit, tma


@gluon_jit
def store_tile(
    out: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor, tile: gl.tensor, row: gl.tensor, col: gl.tensor,
    end: gl.tensor, n_end: gl.tensor, COALESCE: gl.constexpr, WARPS: gl.constexpr,
) -> None:  # fmt: skip
    """Write a tile from registers; the strides say whether it lands as C or as C transposed. COALESCE first turns the
    matrix unit's layout into whole rows, which pays for wide tiles."""
    ROWS: gl.constexpr = tile.shape[0]
    COLS: gl.constexpr = tile.shape[1]
    values = tile.to(out.dtype.element_ty)
    if COALESCE:
        values = gl.convert_layout(values, gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [WARPS, 1], [1, 0]))
    layout: gl.constexpr = values.type.layout
    m = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    n = col + gl.arange(0, COLS, layout=gl.SliceLayout(0, layout))
    offset = m[:, None].to(gl.int64) * stride_m + n[None, :].to(gl.int64) * stride_n
    gl.store(out + offset, values, mask=(m[:, None] < end) & (n[None, :] < n_end))


@gluon_jit
def _stage_tile(out_desc: gl.tensor, buffer: gl.tensor, tile: gl.tensor, row: gl.tensor, col: gl.tensor) -> None:
    """Write a tile through shared memory with TMA; the next tile's products may start while it drains."""
    buffer.store(tile.to(out_desc.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(out_desc, [row, col], buffer)


@gluon_jit
def write(
    outs: gl.tensor, c_buffers: gl.tensor, e_buffers: gl.tensor, acc: gl.tensor, acc_e: gl.tensor, row: gl.tensor,
    col: gl.tensor, end: gl.tensor, N: gl.tensor, n_end: gl.tensor, stride_m: gl.tensor, stride_n: gl.tensor,
    COLS: gl.constexpr, EXTRA: gl.constexpr, STASH: gl.constexpr, STORE: gl.constexpr, ME: gl.constexpr,
) -> None:  # fmt: skip
    """Round a finished tile and write it."""
    out, out_e = outs
    if STORE == 1:
        tma.store_wait(pendings=0)
        gl.thread_barrier()
        _stage_tile(out, c_buffers.index(2 * ME if STASH else ME), acc, row, col)
        if EXTRA:
            if EXTRA == COLS:  # both halves leave through one buffer, one after the other
                tma.store_wait(pendings=0)
                gl.thread_barrier()
            _stage_tile(out_e, e_buffers.index(ME), acc_e, row, col + COLS)
    else:
        limit = n_end
        if STORE == 2:
            limit = N  # known to be a multiple of 8, which lets whole rows be written 16 bytes at a time
        store_tile(out, stride_m, stride_n, acc, row, col, end, limit, STORE == 2, 4)
        if EXTRA:
            store_tile(out, stride_m, stride_n, acc_e, row, col + COLS, end, limit, STORE == 2, 4)
