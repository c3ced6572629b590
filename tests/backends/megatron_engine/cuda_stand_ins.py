"""What Megatron-core 0.19 asks of torch.cuda even for tensors on the CPU, so that its code can run in tests without a GPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch


class _Stream:
    """Streams and events do nothing: the CPU has one."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: _Stream()


def need_megatron() -> None:
    """Skip the test where Megatron-core is not installed; where it is, let it run without a GPU."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (known to work: 0.19.2)")
    if not torch.cuda.is_available():
        install()


def install() -> None:
    """Replace functions of torch.cuda in this process, once. Only for a torch without CUDA."""
    cuda: Any = torch.cuda
    if cuda.Stream is _Stream:
        return
    assert not torch.cuda.is_available(), "stand-ins beside a real GPU"
    cuda.current_device = lambda: torch.device("cpu")
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.get_rng_state = torch.get_rng_state
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    anything: Any = torch
    for name in ("tensor", "zeros", "empty", "ones", "full"):
        setattr(anything, name, _on_cpu(getattr(torch, name)))
    anything.Tensor.cuda = lambda self, *_, **__: self
    kind_of = torch.Tensor.type
    anything.Tensor.type = lambda self, *to, **options: (
        kind_of(self, *to, **options) if to or options else kind_of(self).replace("torch.", "torch.cuda.", 1)
    )
    from megatron.core.tensor_parallel import random

    generators: Any = random  # there is no dropout to draw for, so states are kept and never set
    generators.CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    generators._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    generators._set_cuda_rng_state = lambda *_, **__: None
    exchange = torch.distributed.all_to_all_single
    anything.distributed.all_to_all_single = lambda *given, **options: exchange(
        *given, **{name: each.tolist() if isinstance(each, torch.Tensor) else each for name, each in options.items()}
    )


def _on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def made(*given: Any, **options: Any) -> torch.Tensor:
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        return make(*given, **options)

    return made
