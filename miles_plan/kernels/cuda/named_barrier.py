"""The multiprocessor's named barriers, at which warps of a warp-specialised kernel meet behind Triton's back.

To arrive at one is a single instruction that waits for nobody. With an mbarrier the warps of a group would first have to meet, so that
one thread can speak for them. Triton takes the low numbers, one for each part of a kernel; those here end at the last, 15.
"""

from __future__ import annotations

from typing import Any

from .toolchain import gl, tl
from .wgmma import THREADS, inline, plain

GROUPS = 2  # consumer warp groups, whose threads all take part
WARP = 32
MOST_STAGES = 3  # of a ring whose stages are given back here
# First number and threads. A turn is taken by one of the two groups; what a group gives back by itself (its queries), and
# a stage that both give back, is taken by the producer's warp.
_BARRIERS = {
    "queries": (6, THREADS + WARP),
    "turn": (8, GROUPS * THREADS),
    "keys": (10, GROUPS * THREADS + WARP),
    "values": (13, GROUPS * THREADS + WARP),
}


def _at(instruction: str, kind: Any, index: Any, semantic: Any) -> Any:
    first, threads = _BARRIERS[plain(kind)]
    asm = f"{{ .reg .b32 barrier; add.s32 barrier, $1, {first}; bar.{instruction} barrier, {threads}; mov.b32 $0, 0; }}"
    place = semantic.to_tensor(index)
    return tl.inline_asm_elementwise(asm, "=r,r", [place], dtype=tl.int32, is_pure=False, pack=1, _semantic=semantic)


@inline
def arrive(kind: Any, index: Any, _semantic: Any = None) -> Any:
    """This thread's warp has reached barrier `index` of a kind: "turn" or "queries" (0, 1), "keys" or "values" (a stage). Does not wait."""
    return _at("arrive", kind, index, _semantic)


@inline
def meet(kind: Any, index: Any, _semantic: Any = None) -> Any:
    """Wait at a barrier until every thread that takes part has arrived or waits; what they did before is seen after it."""
    return _at("sync", kind, index, _semantic)


@inline
def open_turn(group: Any, _semantic: Any = None) -> None:
    """The first warp group's turn begins: the second one's threads arrive."""
    first, threads = _BARRIERS["turn"]
    asm = f"{{ .reg .pred second; setp.eq.u32 second, $1, 1; @second bar.arrive {first}, {threads}; mov.b32 $0, 0; }}"
    tl.inline_asm_elementwise(
        asm, "=r,r", [_semantic.to_tensor(group)], dtype=tl.int32, is_pure=False, pack=1, _semantic=_semantic
    )


@inline
def arrive_after(kind: Any, index: Any, x: Any, count: Any, warps: Any, _semantic: Any = None) -> None:
    """`arrive` once the thread's first `count` elements of x are known, none negative: their signs are added to the number."""
    first, threads = _BARRIERS[plain(kind)]
    each = x.type.numel // (WARP * plain(warps))
    places = gl.full([int(size) for size in x.type.shape], index, gl.int32, x.type.layout, _semantic=_semantic)
    known = range(each, each + min(plain(count), each))
    asm = (
        "{ .reg .b32 barrier, sign, more; mov.b32 sign, 0;"
        + "".join(f" mov.b32 more, ${i}; or.b32 sign, sign, more;" for i in known)
        + f" shr.u32 sign, sign, 31; add.s32 barrier, ${2 * each}, {first}; add.s32 barrier, barrier, sign;"
        f" bar.arrive barrier, {threads}; mov.b32 $0, 0; }}"
    )
    constraints = ",".join(["=r"] * each + ["f"] * each + ["r"] * each)
    tl.inline_asm_elementwise(asm, constraints, [x, places], dtype=tl.int32, is_pure=False, pack=each, _semantic=_semantic)
