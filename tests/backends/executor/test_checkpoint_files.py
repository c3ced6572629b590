"""Model folders that do not fit their configuration, told from the files' headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from miles_plan.backends.executor.checkpoint_files import mismatches, tensor_shapes
from miles_plan.backends.torch_engine.weights import initialise_checkpoint
from miles_plan.catalog.hf_config import architecture_from_hf_config
from tests.backends.executor.tiny_plans import MOE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "moe"
    initialise_checkpoint(MOE, path, 0)
    return path


def found(folder: Path, **change: Any) -> list[str]:
    return list(mismatches(architecture_from_hf_config({**MOE, **change}, "moe"), folder))


def test_a_folder_that_fits_its_configuration(folder: Path) -> None:
    assert found(folder) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 99}, "model.embed_tokens.weight is ["),
        ({"moe_intermediate_size": 999}, "model.layers.{}.mlp.experts.{}.gate_proj.weight is ["),
        ({"num_hidden_layers": MOE["num_hidden_layers"] + 1}, "model.layers.{}.self_attn.q_proj.weight"),
        ({"num_experts": MOE["num_experts"] * 2}, "model.layers.{}.mlp.gate.weight"),
    ],
)
def test_a_configuration_of_another_model_is_noticed(folder: Path, change: dict[str, Any], words: str) -> None:
    assert any(text.startswith(words) for text in found(folder, **change)), found(folder, **change)


def test_files_that_are_not_whole_are_named(folder: Path, tmp_path: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    for content, words in ((data[:-5], "the file is not whole"), (b"text", "no safetensors file"), (data[:40], "torn")):
        (tmp_path / "model.safetensors").write_bytes(content)
        (text,) = found(tmp_path)
        assert words in text


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert "neither model.safetensors nor" in found(tmp_path)[0]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    assert "part-1.safetensors" in found(tmp_path)[0]


def test_shapes_come_from_all_files_of_an_index(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.zeros(2, 3)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in ("a", "b")}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert tensor_shapes(tmp_path) == {"a": (2, 3), "b": (2, 3)}
