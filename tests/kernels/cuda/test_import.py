"""Without Triton everything imports; only launching a kernel fails, and says why."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import importlib, pkgutil, sys
sys.modules["triton"] = None  # an import of it raises ImportError
import miles_plan.kernels.cuda as package
for module in pkgutil.iter_modules(package.__path__):
    if module.name not in ("megatron_layers", "sglang_backends"):  # subclasses of those packages' classes
        importlib.import_module(f"{package.__name__}.{module.name}")
from miles_plan.kernels.cuda.gemm_portable import gemm_portable_kernel
from miles_plan.kernels.cuda.gemm_kernel import gemm_kernel
for kernel in (gemm_portable_kernel, gemm_kernel):
    try:
        kernel[(1,)]()
    except RuntimeError as error:
        assert "needs triton" in str(error) and kernel.__name__ in str(error), error
    else:
        raise AssertionError("launched")
import torch
from miles_plan.kernels.cuda.matmul import matmul
x = torch.ones(2, 32)
assert matmul(x, x).tolist() == [[32.0, 32.0], [32.0, 32.0]]
"""


def test_the_package_works_without_triton() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


def test_the_package_itself_loads_neither_torch_nor_triton() -> None:
    script = "import sys, miles_plan.kernels.cuda; assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
