from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from miles_plan.backends.engine import EngineError
from miles_plan.backends.training import shard_files
from miles_plan.backends.training.shard_files import read_tensors, write_model, write_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    path = tmp_path / "below" / "rank_00000.safetensors"
    write_tensors(path, TENSORS, {"layout": "tp2"})
    read = read_tensors(path, TENSORS, {"layout": "tp2"})
    assert all(torch.equal(read[name], TENSORS[name]) and read[name].dtype == TENSORS[name].dtype for name in TENSORS)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_file_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "rank.safetensors"
    write_tensors(path, TENSORS, {"layout": "tp2"})
    with pytest.raises(EngineError, match=r"rank\.safetensors was written with layout 'tp2', this engine has 'dp2'"):
        read_tensors(path, TENSORS, {"layout": "dp2"})
    with pytest.raises(EngineError, match="'c' is only on one side"):
        read_tensors(path, {**TENSORS, "c": TENSORS["a"]}, {})
    with pytest.raises(EngineError, match=r"'a' is torch\.float32 \[2, 3\], this engine has torch\.float32 \[3, 2\]"):
        read_tensors(path, {**TENSORS, "a": torch.zeros(3, 2)}, {})
    with pytest.raises(EngineError, match=r"cannot read .*absent\.safetensors"):
        read_tensors(tmp_path / "absent.safetensors", TENSORS, {})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(EngineError, match=r"cannot read .*rank\.safetensors"):
        read_tensors(path, TENSORS, {})


def test_a_disk_that_refuses_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "rank.safetensors"
    write_tensors(path, TENSORS, {})

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_files, "save_file", refuse)
    with pytest.raises(EngineError, match=r"cannot write .*rank\.safetensors \(28 bytes\): .*No space left"):
        write_tensors(path, {"a": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}, {})
    assert torch.equal(read_tensors(path, TENSORS, {})["a"], TENSORS["a"])
    assert len(list(tmp_path.iterdir())) == 1


def test_a_small_model_is_one_file(tmp_path):
    assert write_model(tmp_path, iter(TENSORS.items())) == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], TENSORS["a"])


def test_a_large_model_is_sharded_with_an_index(tmp_path):
    tensors = {f"layer.{index}": torch.full((4,), float(index)) for index in range(5)}
    files = write_model(tmp_path, iter(tensors.items()), max_shard_bytes=32)
    assert files == [*(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)), "model.safetensors.index.json"]
    index = json.loads((tmp_path / files[-1]).read_text())
    assert index["metadata"]["total_size"] == 80
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    assert len(list(tmp_path.iterdir())) == 4
