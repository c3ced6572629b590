"""A scalar of its own in each of a warp's thirty-two lanes, as PTX's instructions on them.

Gluon takes a scalar to be the same in every thread. One computed from `lane()` is not: it may be computed with, loaded by, and
given to `from_lane`, which makes it the same again, and decide nothing else. So a table of thirty-two entries is one load and one
register, and an entry of it one instruction, where the sum over a tensor's lanes that picks it takes ten.
"""

from __future__ import annotations

from typing import Any

from .toolchain import tl
from .wgmma import inline


def _emit(asm: str, given: list[Any], semantic: Any) -> Any:
    constraints = ",".join(["=r"] + ["r"] * len(given))
    places = [semantic.to_tensor(x) for x in given]
    return tl.inline_asm_elementwise(asm, constraints, places, dtype=tl.int32, is_pure=False, pack=1, _semantic=semantic)


@inline
def lane(_semantic: Any = None) -> Any:
    """This thread's place in its warp."""
    return _emit("mov.u32 $0, %laneid;", [], _semantic)


@inline
def from_lane(x: Any, index: Any, _semantic: Any = None) -> Any:
    """What x is in lane `index`."""
    return _emit("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", [x, index], _semantic)
