from __future__ import annotations

from pathlib import Path

import pytest

from miles_plan.ir.plan import Plan
from tests.report.sample_plans import NAMES, load_plan
from tests.report.sample_run import RunWriter


@pytest.fixture(scope="session")
def embedded_plan() -> Plan:
    return load_plan("embedded")


@pytest.fixture(scope="session")
def moe_plan() -> Plan:
    return load_plan("moe_1024")


@pytest.fixture(scope="session")
def disaggregated_plan() -> Plan:
    return load_plan("disaggregated")


@pytest.fixture(scope="session", params=NAMES)
def any_plan(request: pytest.FixtureRequest) -> Plan:
    return load_plan(request.param)


@pytest.fixture
def run_dir(tmp_path: Path, embedded_plan: Plan) -> Path:
    return RunWriter(embedded_plan).write(tmp_path / "run")
