"""The GPU benchmark's cases: each names a spec that compiles with its settings, for engines that can be driven."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.engines.__main__ import CASES
from miles_plan.backends.executor.unsupported import unsupported
from miles_plan.cli.compile import compiled_job


@pytest.mark.parametrize("name", CASES)
def test_every_case_compiles_and_lacks_nothing_but_packages(name: str) -> None:
    case = CASES[name]
    plan = compiled_job(f"specs/{case.spec}.yaml", list(case.settings), []).plan
    assert plan.cluster.num_gpus == case.gpus
    found = [finding for finding in unsupported(plan) if "not installed" not in finding.message]
    assert found == []


def test_a_case_that_does_not_exist_is_refused_by_name() -> None:
    command = [sys.executable, "-m", "benchmarks.engines", "out", "colocatd"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no case colocatd" in done.stderr
