"""Shared memory by its addresses, for what Triton would put a barrier of the whole partition around.

Triton lets no warp of a partition wait twice at one mbarrier, or load what was stored before, without meeting all other warps of the
partition in between. Two warp groups of one partition that take turns at the tensor core must not meet so. Gluon does not say where
a buffer lies, so a kernel asks: before anything else is there, it writes into shared memory, at every place where a buffer may
begin, the address of the place, and reads a buffer.
"""

from __future__ import annotations

from typing import Any

from .toolchain import gl, gluon_jit, tl
from .wgmma import inline, plain

TENSOR_ALIGNMENT = 1024  # of buffers that the copy engine or the tensor core swizzles
SMALL_BYTES = 2048  # at the end of shared memory, where barriers and other small buffers lie
GROUP_THREADS = 128


def _scalars(asm: str, given: list[Any], results: int, semantic: Any) -> Any:
    constraints = ",".join(["=r"] * results + ["r"] * len(given))
    places = [semantic.to_tensor(x) for x in given]
    dtype = tl.int32 if results == 1 else (tl.int32,) * results
    found = tl.inline_asm_elementwise(asm, constraints, places, dtype=dtype, is_pure=False, pack=1, _semantic=semantic)
    return found if results == 1 else tl.core.tuple(list(found))


@inline
def mark_places(threads: Any, _semantic: Any = None) -> None:
    """Write its address to each multiple of TENSOR_ALIGNMENT and, in the last SMALL_BYTES, to each of eight.

    To be called by `threads` threads, of which each but a few write two words; a barrier must follow.
    """
    count = plain(threads)
    lines = [
        "{ .reg .b32 at, end, from; .reg .pred there; mov.u32 from, %tid.x; mov.u32 at, global_smem; mov.u32 end, %dynamic_smem_size;",
        f"add.u32 end, end, at; mad.lo.u32 at, from, {TENSOR_ALIGNMENT}, at;",
        "setp.lt.u32 there, at, end; @there st.shared.u32 [at], at;",
        f"and.b32 end, end, -8; mad.lo.u32 at, from, 8, end; sub.u32 at, at, {SMALL_BYTES};",
    ]
    for _ in range(SMALL_BYTES // (8 * count)):
        lines.append(f"st.shared.u32 [at], at; add.u32 at, at, {8 * count};")
    lines.append("mov.b32 $0, 0; }")
    _scalars(" ".join(lines), [], 1, _semantic)


@gluon_jit
def address_of(word: gl.tensor) -> gl.tensor:
    """The address of a buffer of one element, after `mark_places` and a barrier."""
    return gl.max(word.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0).to(gl.int32)


@inline
def warp_group(_semantic: Any = None) -> Any:
    """Which of the kernel's warp groups this thread is in."""
    return _scalars(f"{{ mov.u32 $0, %tid.x; shr.u32 $0, $0, {GROUP_THREADS.bit_length() - 1}; }}", [], 1, _semantic)


@inline
def own_place(address: Any, bytes_each: Any, _semantic: Any = None) -> Any:
    """Where this thread's part of a buffer begins that gives each thread `bytes_each` bytes: warp by warp, its lanes' in turn."""
    wide = _in_memory(address)
    size = 32 * plain(bytes_each)
    asm = f"{{ .reg .b32 own, lane; mov.u32 own, %tid.x; shr.u32 own, own, 5; mul.lo.u32 own, own, {size}; mov.u32 lane, %laneid;"
    asm += " mad.lo.u32 own, lane, 16, own;"
    asm += " .reg .b64 wide; cvt.u64.u32 wide, own; add.u64 $0, wide, $1; }" if wide else " add.u32 $0, own, $1; }"
    constraints, dtype = ("=l,l", tl.int64) if wide else ("=r,r", tl.int32)
    return tl.inline_asm_elementwise(asm, constraints, [address], dtype=dtype, is_pure=False, pack=1, _semantic=_semantic)


@inline
def start_at(address: Any, count: Any, _semantic: Any = None) -> None:
    """Let `count` mbarriers from an address on begin, each for one arrival: by one thread, between two barriers of all."""
    inits = " ".join(f"@one mbarrier.init.shared.b64 [$1 + {8 * i}], 1;" for i in range(plain(count)))
    asm = f"{{ .reg .pred one; .reg .b32 own; mov.u32 own, %tid.x; setp.eq.u32 one, own, 0; {inits} mov.b32 $0, 0; }}"
    _scalars(asm, [address], 1, _semantic)


@inline
def wait_at(address: Any, phase: Any, _semantic: Any = None) -> None:
    """Wait until the mbarrier at an address has completed the phase of this parity."""
    _scalars(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [$1], $2; @!done bra.uni again; mov.b32 $0, 0; }",
        [address, phase], 1, _semantic,
    )  # fmt: skip


@inline
def eight_at(address: Any, _semantic: Any = None) -> Any:
    """The eight int32 at an address, a multiple of 16."""
    asm = "{ ld.shared.v4.u32 {$0, $1, $2, $3}, [$8]; ld.shared.v4.u32 {$4, $5, $6, $7}, [$8 + 16]; }"
    return _scalars(asm, [address], 8, _semantic)


@inline
def put_at(x: Any, address: Any, warps: Any, _semantic: Any = None) -> None:
    """Store each thread's elements of a float32 tensor where `taken_from` finds them: four by four, a warp's lanes side by side.

    address: the thread's `own_place`, in shared memory if of 32 bits, in memory if of 64.
    """
    each = x.type.numel // (32 * plain(warps))
    lines = []
    for i in range(0, each, 4):
        registers = ", ".join(f"${each + i + j}" for j in range(4))
        lines.append(f"st.{_space(address)}.v4.f32 [${2 * each} + {4 * 32 * i}], {{{registers}}};")
    _on_all(" ".join([*lines, "mov.f32 $0, 0f00000000;"]), x, address, each, _semantic)


@inline
def taken_from(x: Any, address: Any, warps: Any, _semantic: Any = None) -> Any:
    """A tensor of x's shape and layout that was stored by `put_at`; of x nothing else is used."""
    each = x.type.numel // (32 * plain(warps))
    lines = []
    for i in range(0, each, 4):
        registers = ", ".join(f"${i + j}" for j in range(4))
        lines.append(f"ld.{_space(address)}.v4.f32 {{{registers}}}, [${2 * each} + {4 * 32 * i}];")
    return _on_all(" ".join(lines), x, address, each, _semantic)


@inline
def store_warp_rows(pairs: Any, address: Any, memory: Any, offset: Any, warps: Any, _semantic: Any = None) -> None:
    """Store a warp's sixteen rows of half precision, two elements in an int32 in `wgmma`'s layout, a whole row by neighbouring lanes.

    address: where the warp's part of a buffer in shared memory begins, through which they change lanes. memory, offset: where rows
    go, and in each of the lanes below 16 how many bytes on its row goes, a multiple of 16, or a negative number if nowhere.
    A row in shared memory is 16 bytes longer, for the sake of its banks.
    """
    each = pairs.type.numel // (32 * plain(warps))
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
    for first in range(0, 16, 32 // lanes):
        lines += [
            f"add.u32 d, row, {first}; shfl.sync.idx.b32 off, ${4 * each}, d, 31, -1; setp.ge.s32 there, off, 0; add.u32 off, off, part;",
            f"ld.shared.v4.b32 {{a, b, c, d}}, [at + {first * (row_bytes + 16)}];",
            f"cvt.s64.s32 wide, off; add.s64 to, wide, ${3 * each}; @there st.global.v4.b32 [to], {{a, b, c, d}};",
        ]
    lines.append("bar.warp.sync -1; mov.b32 $0, 0; }")
    shape, layout = [int(size) for size in pairs.type.shape], pairs.type.layout
    given = [pairs] + [gl.full(shape, x, x.dtype, layout, _semantic=_semantic) for x in (address, memory, offset)]
    constraints = ",".join(["=r"] * each + ["r"] * (2 * each) + ["l"] * each + ["r"] * each)
    tl.inline_asm_elementwise(" ".join(lines), constraints, given, dtype=tl.int32, is_pure=False, pack=each, _semantic=_semantic)


def _in_memory(address: Any) -> bool:
    """Whether an address is in memory, as 64 bits, and not in shared memory."""
    return bool(address.dtype == tl.int64)


def _space(address: Any) -> str:
    return "global" if _in_memory(address) else "shared"


def _on_all(asm: str, x: Any, address: Any, each: int, semantic: Any) -> Any:
    """`asm` once on all of a thread's elements of x and on an address."""
    shape = [int(size) for size in x.type.shape]
    place = gl.full(shape, address, address.dtype, x.type.layout, _semantic=semantic)
    constraints = ",".join(["=f"] * each + ["f"] * each + ["l" if _in_memory(address) else "r"] * each)
    return tl.inline_asm_elementwise(
        asm, constraints, [x, place], dtype=tl.float32, is_pure=False, pack=each, _semantic=semantic
    )
