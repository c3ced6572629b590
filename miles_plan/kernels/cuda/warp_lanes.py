"""A scalar of its own in each of a warp's thirty-two lanes, as PTX's instructions on them.

Gluon takes a scalar to be the same in every thread. One computed from `lane()` is not: it may be computed with, loaded by, and
given to `from_lane`, which makes it the same again, and decide nothing else. So a table of thirty-two entries is one load and one
register, and an entry of it one instruction, where the sum over a tensor's lanes that picks it takes ten.
"""

from __future__ import annotations

from typing import Any

from .toolchain import tl
from .wgmma import inline, plain


def _emit(asm: str, given: list[Any], semantic: Any) -> Any:
    constraints = ",".join(["=r"] + ["r"] * len(given))
    places = [semantic.to_tensor(x) for x in given]
    return tl.inline_asm_elementwise(asm, constraints, places, dtype=tl.int32, is_pure=False, pack=1, _semantic=semantic)


@inline
def lane(_semantic: Any = None) -> Any:
    """This thread's place in its warp."""
    return _emit("mov.u32 $0, %laneid;", [], _semantic)


@inline
def warp_group(_semantic: Any = None) -> Any:
    """This thread's warp group's place among the kernel's."""
    return _emit("{ mov.u32 $0, %tid.x; shr.u32 $0, $0, 7; }", [], _semantic)


@inline
def warp(_semantic: Any = None) -> Any:
    """This thread's warp's place among the kernel's."""
    return _emit("{ mov.u32 $0, %tid.x; shr.u32 $0, $0, 5; }", [], _semantic)


@inline
def from_lane(x: Any, index: Any, _semantic: Any = None) -> Any:
    """What x is in lane `index`."""
    return _emit("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", [x, index], _semantic)


@inline
def fetch_ahead(address: Any, size: Any, there: Any, _semantic: Any = None) -> None:
    """Ask, in lanes where `there`, for `size` bytes (a multiple of 16) from an address (at one) into L2."""
    asm = (
        "{ .reg .pred there; setp.ne.b32 there, $2, 0;"
        f" @there cp.async.bulk.prefetch.L2.global [$1], {plain(size)}; mov.b32 $0, 0; }}"
    )
    given = [address, _semantic.cast(_semantic.to_tensor(there), tl.int32)]
    tl.inline_asm_elementwise(asm, "=r,l,r", given, dtype=tl.int32, is_pure=False, pack=1, _semantic=_semantic)
