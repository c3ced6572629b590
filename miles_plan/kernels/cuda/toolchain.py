"""Triton when it is installed, and a stand-in that keeps the kernel modules importable when it is not.

Kernel files read `from .toolchain import gl, gluon_jit, jit, tl`. Without Triton the decorators hand back an object that
raises `RuntimeError` when launched, so the planner's machines, documentation builds and type checkers can import everything.
Gluon, which the Hopper kernels are written in, is part of Triton from 3.6 on and still changes: with a release that is not known
here they count as missing, and the portable kernels run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, overload


class _MissingKernel:
    """What a kernel is on a machine without Triton: importable, printable, not launchable."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__

    def __getitem__(self, grid: object) -> Callable[..., Any]:
        raise RuntimeError(
            f"kernel {self.__name__!r} needs triton 3.6 or newer (3.6 or 3.7 if it is Gluon's), which is not installed"
        )


def _missing(function: Callable[..., Any] | None = None, /, **_: object) -> Any:
    return _MissingKernel(function) if function is not None else _MissingKernel


def _module(name: str) -> Any:
    """The module, or None where Triton or this part of it is missing."""
    try:
        return import_module(name)
    except ImportError:
        return None


triton: Any = _module("triton")
tl: Any = _module("triton.language")
_gluon: Any = _module("triton.experimental.gluon")
_hopper: Any = _module("triton.experimental.gluon.language.nvidia.hopper")
_host: Any = _module("triton.experimental.gluon.nvidia.hopper")

GLUON_RELEASES = ((3, 6), (3, 7))  # 3.8 and later have other names and other arguments


def _known_release() -> bool:
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) in GLUON_RELEASES


def _language() -> ModuleType:
    """Gluon's language by its names in Triton 3.6, as a module of our own, so that Triton's stays as it is."""
    language = ModuleType("gluon_language")
    language.__dict__.update(vars(_gluon.language))
    if not hasattr(language, "thread_barrier"):
        language.thread_barrier = language.barrier  # type: ignore[attr-defined]  # its name from 3.7 on
    return language


def assembly_digest(folder: Path) -> str:
    """Of the files whose functions emit instructions (`wgmma.inline`) while a kernel is compiled."""
    texts = (file.read_bytes() for file in sorted(folder.glob("*.py")))
    return hashlib.sha256(b"".join(text for text in texts if b"\n@inline\n" in text)).hexdigest()


def keyed(decorator: Callable[..., Any], digest: str) -> Callable[..., Any]:
    """Gluon's decorator, with `digest` in the key under which a compiled kernel is kept.

    Triton's key follows a kernel's source and that of the kernels it calls, not what emits instructions for it: with another
    release of this package it would take old code from its cache.
    """

    def decorate(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        if function is None:
            return partial(decorate, **options)
        kernel = decorator(function, **options)
        kernel._unsafe_update_src(f"{kernel.src}\n# {digest}")
        return kernel

    return decorate


HAVE_TRITON: bool = triton is not None and tl is not None
HAVE_GLUON: bool = HAVE_TRITON and None not in (_gluon, _hopper, _host) and _known_release()

gl: Any = _language() if HAVE_GLUON else None
tma: Any = _hopper.tma if HAVE_GLUON else None
async_copy: Any = _hopper.async_copy if HAVE_GLUON else None
mbarrier: Any = _hopper.mbarrier if HAVE_GLUON else None
warpgroup_mma: Any = _hopper.warpgroup_mma if HAVE_GLUON else None
warpgroup_mma_wait: Any = _hopper.warpgroup_mma_wait if HAVE_GLUON else None
fence_async_shared: Any = _hopper.fence_async_shared if HAVE_GLUON else None
gluon_descriptor: Any = _host.TensorDescriptor if HAVE_GLUON else None

# Programmatic dependent launch: a kernel may start while the one before it ends, and then waits before it touches memory.
_dependent: Any = _module("triton.language.extra.cuda") if HAVE_GLUON else None
grid_wait: Any = getattr(_dependent, "gdc_wait", None)
grid_release: Any = getattr(_dependent, "gdc_launch_dependents", None)

if TYPE_CHECKING:

    @overload
    def jit(function: Callable[..., Any], /) -> Any: ...
    @overload
    def jit(*, do_not_specialize: Sequence[str]) -> Callable[[Callable[..., Any]], Any]: ...
    def jit(function: Callable[..., Any] | None = None, /, **_: object) -> Any:
        """The decorator of a Triton kernel."""

    gluon_jit = jit
else:
    jit = triton.jit if HAVE_TRITON else _missing
    gluon_jit = keyed(_gluon.jit, assembly_digest(Path(__file__).parent)) if HAVE_GLUON else _missing
