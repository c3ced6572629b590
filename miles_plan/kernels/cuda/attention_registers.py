"""The order in which the assembler puts the prefill kernel's arithmetic on registers, which Gluon has no words for."""

from __future__ import annotations

from typing import Any

from .toolchain import gl, gluon_jit, tl
from .wgmma import inline, plain


@inline
def _first_after(x: Any, y: Any, warps: Any, _semantic: Any = None) -> Any:
    """x; of a thread's elements the first two are their maxima with y * 0 - inf, which is -inf or not a number."""
    each = x.type.numel // (32 * plain(warps))
    asm = f"{{ .reg .f32 least; fma.rn.f32 least, ${2 * each}, 0f00000000, 0fFF800000; "
    asm += " ".join(f"max.f32 ${i}, ${i}, least;" for i in range(2)) + " }"
    constraints = ",".join(["=f"] * each + [str(i) for i in range(each)] + ["f"] * each)
    return tl.inline_asm_elementwise(asm, constraints, [x, y], dtype=tl.float32, is_pure=True, pack=each, _semantic=_semantic)


@gluon_jit
def after(x: gl.tensor, y: gl.tensor) -> gl.tensor:
    """x [rows, 8, keys] for a maximum that the assembler is to find once y [rows, 8] is known."""
    _, wide = gl.broadcast(x, gl.convert_layout(y, gl.SliceLayout(2, x.type.layout))[:, :, None])
    return _first_after(x, wide, gl.num_warps())
