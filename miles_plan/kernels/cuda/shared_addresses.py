"""Shared memory by its addresses, for what Triton would put a barrier of the whole partition around.

Triton lets no warp of a partition wait twice at one mbarrier, or load what was stored before, without meeting all other warps of the
partition in between. Two warp groups of one partition that take turns at the tensor core must not meet so. Gluon does not say where
a buffer lies, so a kernel finds out: before anything else is there, it writes into shared memory, at every place where a buffer may
begin, the address of the place, and reads the buffer's first word. Who uses a buffer by its address alone keeps it alive for Triton.
"""

from __future__ import annotations

from typing import Any

from .toolchain import gl, gluon_jit, tl
from .wgmma import inline, plain

TENSOR_ALIGNMENT = 1024  # of buffers that the copy engine or the tensor core swizzles
SMALL_BYTES = 2048  # at the end of shared memory, where barriers and other small buffers lie


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
