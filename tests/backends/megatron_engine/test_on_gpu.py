"""Both cluster trainers on a real GPU: Transformer Engine's layers, Megatron's, ours and transformers' agree; memory is freed.

Thresholds are a few times what one H200 showed (benchmarks/results/trainers_h200.jsonl).
"""

from __future__ import annotations

import pytest

from benchmarks.engines.trainers_on_gpus import Case, compare, measure
from miles_plan.backends.megatron_engine.versions import installed

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _packages() -> None:
    import torch

    if not torch.cuda.is_available() or installed("megatron-core") is None or installed("transformer-engine") is None:
        pytest.skip("needs a GPU, megatron-core and Transformer Engine")


OTHERS = {
    "local": Case("local", "small", options={"layer_spec": "local"}, like="small"),
    "invariant": Case("invariant", "small", options={"layer_spec": "batch_invariant"}, like="small"),
    "fsdp": Case("fsdp", "small", engine="fsdp", like="small"),
    "recompute": Case("recompute", "small", options={"recompute": "full"}, like="small"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_layers_score_and_learn_alike(other):
    rows = {"small": [measure(Case("small", "small"), 0, None)]}
    own = [measure(OTHERS[other], 0, None)]
    compare(rows, OTHERS[other], own)
    against = own[0]["against"]
    assert against["log_prob_max"] < 0.1
    assert against["log_prob_mean"] < 0.02
    assert abs(against["grad_norm"][0]) < 0.01
    assert own[0]["same_bits_twice"]


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_offloading_frees_the_device_and_loses_nothing(model):
    found = measure(Case(model, model, phases=True), 0, None)
    assert found["same_after_offload"]
    assert found["offloaded_bytes"] < 0.03 * found["built_bytes"]
    assert found["stream_bytes"] == found["parts"]["weights"]
    assert found["steps"][-1]["loss"] < found["steps"][0]["loss"]
    if model == "moe":
        assert found["routing"][0] > 0.99 * found["routing"][1]  # random experts are seldom the router's own
