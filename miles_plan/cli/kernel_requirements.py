"""What the `kernels` commands need beyond planning: findings where it is missing."""

from __future__ import annotations

import importlib.util

from miles_plan.diagnostics import PlanError, error


def require_torch() -> None:
    """Raise MP423 where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise PlanError(
            (error("MP423", "the kernels need torch, which is not installed", help="pip install 'miles-plan[run]'"),)
        )


def require_torch_and_triton() -> None:
    """Raise MP423 without torch, MP455 without a CUDA device or Triton."""
    require_torch()
    import torch

    if not torch.cuda.is_available():
        raise PlanError(
            (
                error(
                    "MP455",
                    "no CUDA device is there for the kernels to run on",
                    help="run this on a machine with an NVIDIA GPU and a CUDA build of torch; tests cover the CPU references",
                ),
            )
        )
    if importlib.util.find_spec("triton") is None:
        raise PlanError(
            (error("MP455", "Triton, which the kernels are written in, is not installed", help="pip install 'triton>=3.6'"),)
        )
