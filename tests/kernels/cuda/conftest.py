"""What the GPU kernels' tests share: the device for those that need one, and relative errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def gpu() -> torch.device:
    """The first CUDA device; the test is skipped where there is none."""
    pytest.importorskip("triton", reason="needs Triton")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture
def error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """error(result, exact): root mean square of the difference over that of the exact values."""

    def relative(result: torch.Tensor, exact: torch.Tensor) -> float:
        return float((result.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())

    return relative
