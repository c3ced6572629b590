"""Tiny checkpoints of every family, made once per session by the real transformers classes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from miles_plan.backends.torch_engine.weights import initialise_checkpoint

COMMON: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_biased_llama3_rope": {
        "model_type": "llama",
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen3_tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 16, **MOE},
    "qwen3_moe_mixed": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        **MOE,
        "norm_topk_prob": False,
        "mlp_only_layers": [0],
        "num_hidden_layers": 3,
    },
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's checkpoint, random weights with seed 0."""
    root = tmp_path_factory.mktemp("checkpoints")

    def directory(family: str) -> Path:
        path = root / family
        if not path.exists():
            initialise_checkpoint({**COMMON, **FAMILIES[family]}, path, seed=0)
        return path

    return directory


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[[int, Callable[[int, str], Any]], list[Any]]:
    """run_ranks(size, function): what `function(rank, rendezvous)` returns for each rank, ranks being threads."""
    calls = iter(range(1000))

    def run(size: int, function: Callable[[int, str], Any]) -> list[Any]:
        rendezvous = f"file://{tmp_path}/rendezvous-{next(calls)}"
        with ThreadPoolExecutor(size) as threads:
            return list(threads.map(lambda rank: function(rank, rendezvous), range(size)))

    return run
