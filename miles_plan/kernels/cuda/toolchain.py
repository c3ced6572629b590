"""Triton when it is installed, and a stand-in that keeps the kernel modules importable when it is not.

Kernel files read `from .toolchain import gl, gluon_jit, jit, tl`. Without Triton the decorators hand back an object that
raises `RuntimeError` when launched, so the planner's machines, documentation builds and type checkers can import everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = [
    "HAVE_GLUON",
    "HAVE_TRITON",
    "TensorDescriptor",
    "fence_async_shared",
    "gl",
    "gluon_descriptor",
    "gluon_jit",
    "jit",
    "mbarrier",
    "tl",
    "tma",
    "triton",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]


class _MissingKernel:
    """What a kernel is on a machine without Triton: importable, printable, not launchable."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__

    def __getitem__(self, grid: object) -> Callable[..., Any]:
        raise RuntimeError(f"kernel {self.__name__!r} needs triton 3.6 or newer, which is not installed")


def _missing(function: Callable[..., Any] | None = None, **_: object) -> Any:
    return _MissingKernel(function) if function is not None else _MissingKernel


triton: Any = None
tl: Any = None
gl: Any = None
tma: Any = None
mbarrier: Any = None
warpgroup_mma: Any = None
warpgroup_mma_wait: Any = None
fence_async_shared: Any = None
TensorDescriptor: Any = None
gluon_descriptor: Any = None
jit: Any = _missing
gluon_jit: Any = _missing

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    jit = triton.jit
    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as gluon_descriptor

    gluon_jit = gluon.jit
    HAVE_GLUON = True
except ImportError:
    HAVE_GLUON = False
