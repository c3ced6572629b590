"""The memory of this package's trainers, held against what an H200 showed (benchmarks/engines/trainer_memory.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles_plan.catalog.hf_config import architecture_from_hf_config
from miles_plan.cost.train_memory import train_memory
from miles_plan.cost.train_options import Engine, Layers, TrainMemoryOptions
from miles_plan.ir.layout import TrainLayout

ROWS = json.loads((Path(__file__).parents[2] / "benchmarks/results/trainer_memory_h200.json").read_text(encoding="utf-8"))
TRAINERS: dict[str, tuple[Engine, Layers]] = {
    "megatron": ("megatron", "fused"),
    "invariant": ("megatron", "batch_invariant"),
    "fsdp": ("fsdp2", "transformers"),
}
QWEN3_0_6B = {  # what the benchmark calls dense
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}  # fmt: skip
AT_REST = ("parameters", "gradients", "optimizer", "workspace", "weight-gradient scratch", "fragmentation")
POINTS = [(each["trainer"], point) for each in ROWS["trainers"] for point in each["points"]]


def added_bytes(trainer: str, point: dict[str, Any], what: str) -> float:
    """What a pass or a step adds by the plan to what is there at rest."""
    engine, layers = TRAINERS[trainer]
    options = TrainMemoryOptions(
        engine=engine, layers=layers, tokens_per_gpu=point["tokens"], scored_tokens=point["rows"], seq_len=128,
        entropy=what == "step", forward_only=what == "score",
    )  # fmt: skip
    terms = train_memory(architecture_from_hf_config(QWEN3_0_6B, "qwen3-0.6b"), TrainLayout(), options).terms
    return sum(term.value for term in terms if term.name not in AT_REST)


@pytest.mark.parametrize(("trainer", "point"), POINTS, ids=lambda each: each if isinstance(each, str) else str(each["tokens"]))
def test_peaks_are_planned_within_three_percent(trainer: str, point: dict[str, Any]) -> None:
    for what in ("score", "step", "step_without_entropy"):
        added, measured = added_bytes(trainer, point, what), point[f"{what}_peak_bytes"]
        assert point["rest_bytes"] + added == pytest.approx(point["rest_bytes"] + measured, rel=0.03)
        if trainer != "fsdp":
            assert added == pytest.approx(measured, rel=0.015)
