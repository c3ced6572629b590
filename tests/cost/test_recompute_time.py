from __future__ import annotations

import numpy as np

from miles_plan.catalog.models import find_model
from miles_plan.cost.layer_time import TERMS
from miles_plan.cost.recompute_time import recomputed_layers, recomputed_shares

QWEN = find_model("qwen3-30b-a3b")
MOE = QWEN.kinds[-1]
DENSE = find_model("qwen3-8b").kinds[0]


def test_full_recomputation_runs_everything_again() -> None:
    assert recomputed_shares(MOE, QWEN.hidden_size, "full", set()) == dict.fromkeys(TERMS, 1.0)


def test_experts_are_only_run_again_where_there_are_some() -> None:
    assert recomputed_shares(DENSE, 4096, "selective", {"moe"})["gemm"] == 0.0
    shares = recomputed_shares(MOE, QWEN.hidden_size, "selective", {"moe"})
    assert 0.3 < shares["gemm"] < 1.0
    assert shares["ep"] == 1.0


def test_attention_alone() -> None:
    shares = recomputed_shares(DENSE, 4096, "selective", {"core_attn"})
    assert shares["attention"] == 1.0
    assert shares["gemm"] == shares["memory"] == 0.0


def test_some_layers_of_a_stage() -> None:
    layers = np.array([8.0, 4.0])
    assert list(recomputed_layers("full", 6, layers)) == [0.75, 1.0]
    assert list(recomputed_layers("none", 0, layers)) == [0.0, 0.0]
    assert list(recomputed_layers("selective", 0, layers)) == [1.0, 1.0]
