"""The order in which the assembler puts the prefill kernel's arithmetic on registers, which Gluon has no words for."""

from __future__ import annotations

from typing import Any

from .toolchain import gl, gluon_jit, tl
from .wgmma import inline, plain


@gluon_jit
def once_known(x: gl.tensor, y: gl.tensor) -> gl.tensor:
    """x, for what is to be done with it once y, which is finite, is known: its maximum with y * 0 - inf."""
    return gl.maximum(x, gl.fma(y, 0.0, float("-inf")))


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


@inline
def _pair(low: Any, high: Any, dtype: Any, _semantic: Any = None) -> Any:
    """Two float32 rounded to half precision in one 32-bit register."""
    asm = f"cvt.rn.{'bf16' if plain(dtype) == tl.bfloat16 else 'f16'}x2.f32 $0, $2, $1;"
    return tl.inline_asm_elementwise(asm, "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1, _semantic=_semantic)


@gluon_jit
def packed(x: gl.tensor, dtype: gl.constexpr) -> gl.tensor:
    """x [rows, columns] rounded to half precision, two neighbours in an int32."""
    low, high = x.reshape([x.shape[0], x.shape[1] // 2, 2]).split()
    return _pair(low, high, dtype)


@gluon_jit
def unpacked(pairs: gl.tensor, dtype: gl.constexpr, layout: gl.constexpr) -> gl.tensor:
    """What `packed` has packed, in a layout of the same registers."""
    low = (pairs & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape([pairs.shape[0], pairs.shape[1] * 2]), layout)
