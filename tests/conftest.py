"""What all tests share: the switch that rewrites golden files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before anybody imports torch. Tests start many ranks on few cores: threads that spin while they wait for each other would take
# the cores from the rank that has work (seen: fifty times as long).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")

# Machines that run these tests are shared: an example that takes long is no failure.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files with what the code prints now")


class Golden:
    """Compares text with a file under tests/golden, or rewrites the file when asked."""

    def __init__(self, update: bool) -> None:
        self.update = update
        self.root = Path(__file__).parent / "golden"

    def check(self, name: str, text: str) -> None:
        path = self.root / name
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no golden file {name}: run pytest --update-golden and review it"
        assert text == path.read_text(encoding="utf-8"), f"differs from tests/golden/{name}; --update-golden rewrites it"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.config.getoption("--update-golden"))
