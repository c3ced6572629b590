"""A place in memory of each thread's own, and of each warp's, for tensors that leave registers for a while.

What a thread puts there only the same thread takes again, so no barrier is needed, and the tensor's layout does not matter: four
registers at a time, a warp's lanes side by side, with no address but the first to compute. In shared memory the place of a warp
also serves to hand elements from lane to lane, so that rows in `wgmma`'s layout are stored whole.
"""

from __future__ import annotations

from typing import Any

from .toolchain import gl, tl
from .wgmma import inline, plain

WARP = 32


@inline
def own_place(address: Any, bytes_each: Any, _semantic: Any = None) -> Any:
    """Where this thread's part of a buffer begins that gives each thread `bytes_each` bytes: warp by warp, its lanes' in turn."""
    wide = _in_memory(address)
    size = WARP * plain(bytes_each)
    asm = (
        f"{{ .reg .b32 own, lane; mov.u32 own, %tid.x; shr.u32 own, own, 5; mul.lo.u32 own, own, {size}; mov.u32 lane, %laneid;"
    )
    asm += " mad.lo.u32 own, lane, 16, own;"
    asm += " .reg .b64 wide; cvt.u64.u32 wide, own; add.u64 $0, wide, $1; }" if wide else " add.u32 $0, own, $1; }"
    constraints, dtype = ("=l,l", tl.int64) if wide else ("=r,r", tl.int32)
    return tl.inline_asm_elementwise(asm, constraints, [address], dtype=dtype, is_pure=False, pack=1, _semantic=_semantic)


@inline
def put_at(x: Any, address: Any, warps: Any, _semantic: Any = None) -> None:
    """Store each thread's elements of a float32 tensor where `taken_from` finds them: four by four, a warp's lanes side by side.

    address: the thread's `own_place`, in shared memory if of 32 bits, in memory if of 64; or a tensor like x, of which the first of
    a thread's elements is that place.
    """
    each = x.type.numel // (WARP * plain(warps))
    lines = []
    for i in range(0, each, 4):
        registers = ", ".join(f"${each + i + j}" for j in range(4))
        lines.append(f"st.{_space(address)}.v4.f32 [${2 * each} + {4 * WARP * i}], {{{registers}}};")
    _on_all(" ".join([*lines, "mov.f32 $0, 0f00000000;"]), x, address, each, _semantic)


@inline
def taken_from(x: Any, address: Any, warps: Any, _semantic: Any = None) -> Any:
    """A tensor of x's shape and layout that was stored by `put_at`; of x nothing else is used."""
    each = x.type.numel // (WARP * plain(warps))
    lines = []
    for i in range(0, each, 4):
        registers = ", ".join(f"${i + j}" for j in range(4))
        lines.append(f"ld.{_space(address)}.v4.f32 {{{registers}}}, [${2 * each} + {4 * WARP * i}];")
    return _on_all(" ".join(lines), x, address, each, _semantic)


@inline
def store_warp_rows(pairs: Any, address: Any, memory: Any, offset: Any, warps: Any, _semantic: Any = None) -> None:
    """Store a warp's sixteen rows of half precision, two elements in an int32 in `wgmma`'s layout, a whole row by neighbouring lanes.

    address: where the warp's part of a buffer in shared memory begins, through which they change lanes. memory, offset: where rows
    go, and in each of the lanes below 16 how many bytes on its row goes, a multiple of 16, or a negative number if nowhere.
    A row in shared memory is 16 bytes longer, for the sake of its banks.
    """
    each = pairs.type.numel // (WARP * plain(warps))
    row_bytes = each // 2 * 16
    lanes = row_bytes // 16  # of a row
    lines = [
        "{ .reg .b32 lane, at, part, row, off, a, b, c, d; .reg .b64 to, wide; .reg .pred there; mov.u32 lane, %laneid;",
        f"and.b32 at, lane, 15; mad.lo.u32 at, at, {row_bytes + 16}, ${2 * each};",
        "shr.u32 part, lane, 4; mad.lo.u32 at, part, 16, at; bar.warp.sync -1;",
    ]
    for i in range(0, each, 4):
        registers = ", ".join(f"${each + i + j}" for j in range(4))
        lines.append(f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [at + {8 * i}], {{{registers}}};")
    lines += [
        f"bar.warp.sync -1; and.b32 part, lane, {lanes - 1}; shl.b32 part, part, 4; shr.u32 row, lane, {lanes.bit_length() - 1};",
        f"mad.lo.u32 at, row, {row_bytes + 16}, ${2 * each}; add.u32 at, at, part;",
    ]
    for first in range(0, 16, WARP // lanes):
        lines += [
            f"add.u32 d, row, {first}; shfl.sync.idx.b32 off, ${4 * each}, d, 31, -1; setp.ge.s32 there, off, 0; add.u32 off, off, part;",
            f"ld.shared.v4.b32 {{a, b, c, d}}, [at + {first * (row_bytes + 16)}];",
            f"cvt.s64.s32 wide, off; add.s64 to, wide, ${3 * each}; @there st.global.v4.b32 [to], {{a, b, c, d}};",
        ]
    lines.append("bar.warp.sync -1; mov.b32 $0, 0; }")
    shape, layout = [int(size) for size in pairs.type.shape], pairs.type.layout
    given = [pairs] + [gl.full(shape, x, x.dtype, layout, _semantic=_semantic) for x in (address, memory, offset)]
    constraints = ",".join(["=r"] * each + ["r"] * (2 * each) + ["l"] * each + ["r"] * each)
    tl.inline_asm_elementwise(
        " ".join(lines), constraints, given, dtype=tl.int32, is_pure=False, pack=each, _semantic=_semantic
    )


def _in_memory(address: Any) -> bool:
    """Whether an address is in memory, as 64 bits, and not in shared memory."""
    return bool(address.dtype == tl.int64)


def _space(address: Any) -> str:
    return "global" if _in_memory(address) else "shared"


def _on_all(asm: str, x: Any, address: Any, each: int, semantic: Any) -> Any:
    """`asm` once on all of a thread's elements of x and on an address."""
    shape = [int(size) for size in x.type.shape]
    place = address if address.type.is_block() else gl.full(shape, address, address.dtype, x.type.layout, _semantic=semantic)
    constraints = ",".join(["=f"] * each + ["f"] * each + ["l" if _in_memory(address) else "r"] * each)
    return tl.inline_asm_elementwise(
        asm, constraints, [x, place], dtype=tl.float32, is_pure=False, pack=each, _semantic=semantic
    )
