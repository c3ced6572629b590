from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from miles_plan.backends.training.decoder_config import read_config


def changed(directory: Path, tmp_path: Path, **fields: Any) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    return tmp_path


def test_a_mixture_of_experts_is_read(checkpoint: Callable[[str], Path]) -> None:
    config = read_config(checkpoint("qwen3_moe_mixed"))
    assert (config.family, config.num_layers, config.moe_layers) == ("qwen3_moe", 3, (1, 2))
    assert (config.num_experts, config.experts_per_token, config.expert_intermediate_size) == (8, 2, 32)
    assert config.query_key_norm
    assert not config.normalise_gates
    assert config.stop_token_ids == (2,)


def test_biases_follow_the_family(checkpoint: Callable[[str], Path]) -> None:
    flags = {
        family: (config.qkv_bias, config.output_bias)
        for family in ("llama", "llama_biased_llama3_rope", "qwen2", "qwen3")
        if (config := read_config(checkpoint(family)))
    }
    assert flags == {
        "llama": (False, False),
        "llama_biased_llama3_rope": (True, True),
        "qwen2": (True, False),
        "qwen3": (False, False),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
        ({"num_key_value_heads": 3}, "4 heads are no multiple of 3"),
        ({"model_type": "gpt2", "hidden_act": "gelu"}, "model_type 'gpt2' is not one of llama, qwen2, qwen3, qwen3_moe"),
    ],
)
def test_what_cannot_be_run_is_named(
    fields: dict[str, Any], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(changed(checkpoint("llama"), tmp_path, **fields))


def test_a_sliding_window_is_named(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    fields = {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(ValueError, match="layer_types other than full_attention; sliding_window=64"):
        read_config(changed(checkpoint("qwen3"), tmp_path, **fields))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_config(tmp_path)
