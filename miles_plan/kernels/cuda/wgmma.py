"""`wgmma` of any width that is a multiple of eight, for sums held as a tuple of equal pieces.

Gluon's tensors have power-of-two sizes, so its own `warpgroup_mma` cannot multiply 80 or 112 columns in one instruction, and two
narrower ones each read the rows again, which the narrow one waits for. The instruction and the descriptors of its operands are
PTX's (ISA, "asynchronous warpgroup level matrix instructions"); the order of the sum is that of any k16 step.

A piece is a float32 tensor [64, columns] in the layout of `wgmma`; pieces side by side are the registers of the wider instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .toolchain import HAVE_GLUON, gl, tl

THREADS = 128  # of a warp group
STEPS = 4  # k16 steps in 128 bytes of half precision, the width of a swizzled row
# Rows of 128 swizzled bytes, eight rows after 1,024 bytes; the address stands in the lowest 14 bits, in units of 16 bytes.
SWIZZLED = (1 << 62) | (64 << 32)
ALONG_K = SWIZZLED | (1 << 16)  # a row holds 64 of K: the next sixteen are 32 bytes on
ACROSS_K = SWIZZLED | (512 << 16)  # a row holds 64 of M or N, whose next 64 are 8,192 bytes on; the next sixteen of K 2,048
_NAMES = {"bf16": "bf16", "fp16": "f16"}


def inline(function: Callable[..., Any]) -> Any:
    """Called while a kernel is compiled, to emit instructions; `toolchain.assembly_digest` finds it by this decorator."""
    return tl.core.extern(function) if HAVE_GLUON else function


def plain(value: Any) -> Any:
    """What a compile-time constant holds."""
    return getattr(value, "value", value)


def _in_place(asm: str, pieces: list[Any], more: list[Any], constraints: list[str], semantic: Any) -> Any:
    """Emit `asm` once on all registers of the pieces ($0 upwards, read and written) and on what else it reads."""
    each = pieces[0].type.numel // THREADS
    count = each * len(pieces)
    found = tl.inline_asm_elementwise(
        asm, ",".join(["=f"] * count + [str(i) for i in range(count)] + constraints), pieces + more,
        dtype=(tl.float32,) * len(pieces), is_pure=False, pack=each, _semantic=semantic,
    )  # fmt: skip
    return tl.core.tuple(list(found))


@inline
def shared_base(_semantic: Any = None) -> Any:
    """Where the kernel's shared memory begins, which is where its largest allocation lies."""
    return tl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r", [], dtype=tl.int32, is_pure=True, pack=1, _semantic=_semantic
    )


@inline
def multiply(
    pieces: Any, a: Any, b: Any, fresh: Any, dtype: Any, a_km: Any, b_kn: Any, steps: Any = STEPS, _semantic: Any = None
) -> Any:
    """Start `steps` k16 steps and commit them as a group: pieces += A B^T, or = with `fresh`.

    a, b: shared addresses (int32) of 64 rows of A and of the columns' rows of B, each row 64 elements of `dtype`, swizzled by 128
    bytes; both at multiples of 1,024 bytes. With a_km (b_kn) these are 64 rows of K instead, each 64 rows (columns) wide, and
    behind each other for every 64 columns.
    """
    sums = list(pieces)
    each = sums[0].type.numel // THREADS
    count = each * len(sums)
    columns = int(sums[0].type.shape[1]) * len(sums)
    name = _NAMES[str(plain(dtype))]
    registers = ", ".join(f"${i}" for i in range(count))
    across = {"a": bool(plain(a_km)), "b": bool(plain(b_kn))}
    lines = ["{ .reg .b32 at; .reg .b64 a; .reg .b64 b; .reg .pred add;"]
    for matrix, operand in (("a", 2 * count), ("b", 2 * count + each)):
        lying = ACROSS_K if across[matrix] else ALONG_K
        lines.append(f"shr.u32 at, ${operand}, 4; cvt.u64.u32 {matrix}, at; or.b64 {matrix}, {matrix}, {lying};")
    lines.append("wgmma.fence.sync.aligned;")
    on = {matrix: 128 if across[matrix] else 2 for matrix in across}  # to the next sixteen of K, in units of 16 bytes
    for step in range(int(plain(steps))):
        lines += [
            f"setp.ne.b32 add, {0 if plain(fresh) and step == 0 else 1}, 0;",
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{name}.{name} {{{registers}}}, a, b, add, 1, 1, "
            f"{int(across['a'])}, {int(across['b'])};",
            f"add.s64 a, a, {on['a']}; add.s64 b, b, {on['b']};",
        ]
    lines.append("wgmma.commit_group.sync.aligned; }")
    shape, layout = [int(size) for size in sums[0].type.shape], sums[0].type.layout
    # Inline assembly takes tensors of one shape; of these it uses the first element.
    places = [gl.full(shape, address, gl.int32, layout, _semantic=_semantic) for address in (a, b)]
    return _in_place(" ".join(lines), sums, places, ["r"] * (2 * each), _semantic)


@inline
def wait(pieces: Any, outstanding: Any, _semantic: Any = None) -> Any:
    """The pieces, once at most `outstanding` groups are in flight."""
    return _in_place(f"wgmma.wait_group.sync.aligned {int(plain(outstanding))};", list(pieces), [], [], _semantic)


@inline
def rounded(x: Any, dtype: Any, _semantic: Any = None) -> Any:
    """A float32 tensor in half precision, converted at this place: left to itself the assembler puts it off until the registers
    belong to the next sum, and then lets no two products overlap."""
    name = _NAMES[str(plain(dtype))]
    asm = f"cvt.rn.{name}x2.f32 $0, $2, $1;"
    return tl.inline_asm_elementwise(asm, "=r,r,r", [x], dtype=plain(dtype), is_pure=False, pack=2, _semantic=_semantic)


@inline
def computed(x: Any, _semantic: Any = None) -> Any:
    """x, and with it all that it needs, computed before the wait that follows in the program's text.

    The assembler moves a wait for products up above arithmetic that does not depend on them, which is then hidden behind nothing. It
    does not move it above another barrier's instruction, here one that no finite sum of weights lets run.
    """
    asm = "{ .reg .pred never; setp.eq.f32 never, $1, 0f7F7FFFFF; @never bar.arrive 15, 32; mov.f32 $0, $1; }"
    return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1, _semantic=_semantic)
