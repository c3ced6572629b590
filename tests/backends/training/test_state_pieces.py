"""Pieces as a GPU's state has them; on a CPU, where tensors are written as they lie, the cut is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader

from miles_plan.backends.training import state_pieces
from miles_plan.backends.training.state_files import read_state, write_state

STATE = {
    "matrix": torch.randn(37, 5, 2),
    "flat": torch.randn(1001).bfloat16(),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 4),
    "wide": torch.randn(2, 600),
    "bytes": torch.arange(300, dtype=torch.int64).to(torch.uint8),
}


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_pieces, "PIECE_BYTES", 256)
    monkeypatch.setattr(state_pieces, "_staged", lambda tensor: True)


def test_pieces_come_back_as_the_tensors_they_were_cut_from(in_pieces: None, tmp_path: Path) -> None:
    write_state(tmp_path / "state", STATE, {"model": "x"}, rank=0)
    metadata = FileSystemReader(tmp_path / "state").read_metadata().state_dict_metadata
    assert [len(metadata[f"rank_00000/{name}"].chunks) for name in STATE] == [7, 8, 1, 1, 2, 2]
    found = read_state(tmp_path / "state", rank=0)
    for name, tensor in STATE.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), piece_bytes=st.integers(1, 2000))
def test_pieces_are_whole_rows_and_cover_every_one_once(rows: int, columns: int, piece_bytes: int) -> None:
    planner = state_pieces.PiecewisePlanner()
    planner.set_up_planner({"x": torch.zeros(rows, columns)}, is_coordinator=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_pieces, "PIECE_BYTES", piece_bytes)
        patch.setattr(state_pieces, "_staged", lambda tensor: True)
        items = planner.create_local_plan().items
    chunks = [item.tensor_data.chunk for item in items if item.tensor_data is not None]
    covered = [row for chunk in chunks for row in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])]
    assert covered == list(range(rows))
    assert all(
        chunk.sizes[1] == columns and (chunk.sizes[0] == 1 or chunk.sizes[0] * columns * 4 <= piece_bytes) for chunk in chunks
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_state_passes_through_few_host_buffers(tmp_path: Path) -> None:
    state = {f"w{index}": torch.randn(40_000_000, device="cuda") for index in range(4)}
    write_state(tmp_path / "state", state, {}, rank=0)
    found = read_state(tmp_path / "state", rank=0)
    assert all(torch.equal(found[name], tensor.cpu()) for name, tensor in state.items())
