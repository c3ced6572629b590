from __future__ import annotations

from pathlib import Path

import pytest
import torch

from miles_plan.backends.engine import EngineError
from miles_plan.backends.training.state_files import check_state, read_state, write_state

STATE = {"a/weight": torch.randn(3, 4), "moments": torch.randn(7).bfloat16(), "count": torch.tensor(3), "none": torch.zeros(0)}
IDENTITY = {"model": "x", "layout": "tp1"}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    names = write_state(tmp_path / "state", STATE, IDENTITY, rank=0)
    assert sorted(names) == sorted(path.name for path in (tmp_path / "state").iterdir())
    return tmp_path / "state"


def test_what_was_written_comes_back_bit_for_bit(written):
    check_state(written, IDENTITY, rank=0)
    found = read_state(written, rank=0)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in STATE.items())


def test_another_model_or_layout_is_refused(written):
    with pytest.raises(EngineError, match="written with layout 'tp1', this engine has 'tp2'"):
        check_state(written, {**IDENTITY, "layout": "tp2"}, rank=0)


@pytest.mark.parametrize("name", ["rank_00000.json", ".metadata", "__0_0.distcp"])
def test_a_file_that_is_gone_or_cut_short_is_named(written, name):
    path = written / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(EngineError, match=name.replace(".", r"\.")):
        check_state(written, IDENTITY, rank=0)
    path.unlink()
    with pytest.raises(EngineError, match=name.replace(".", r"\.")):
        check_state(written, IDENTITY, rank=0)
