"""Every layout computes what one rank of the embedded trainer does; with Megatron-core installed, on the CPU over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles_plan.backends.megatron_engine.options import MegatronEngineOptions
from miles_plan.backends.torch_engine.options import TrainEngineOptions
from miles_plan.backends.torch_engine.train_engine import TorchTrainEngine
from miles_plan.backends.torch_engine.weights import initialise_checkpoint
from miles_plan.ir.layout import TrainLayout
from miles_plan.ir.options import LossOptions, OptimizerOptions
from tests.backends.megatron_engine import cuda_stand_ins
from tests.backends.sample_batches import in_batch_order, random_batch

SIZES: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3", **SIZES},
    "tied": {"model_type": "qwen3", **SIZES, "tie_word_embeddings": True},
    "biased": {"model_type": "qwen2", **SIZES},
    "moe": {
        "model_type": "qwen3_moe",
        **SIZES,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    "moe_mixed": {
        "model_type": "qwen3_moe",
        **SIZES,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "mlp_only_layers": [0, 2],
    },
}
MOE_LAYERS = {"moe": 4, "moe_mixed": 2}
CASES = [
    ("dense", TrainLayout(tp=2)),
    ("dense", TrainLayout(dp=2)),
    ("dense", TrainLayout(pp=2)),
    ("dense", TrainLayout(pp=2, vpp=2)),
    ("dense", TrainLayout(pp=2, stage_layers=(3, 1))),
    ("tied", TrainLayout(tp=2, pp=2)),
    ("biased", TrainLayout(tp=2)),
    ("moe", TrainLayout(dp=2, ep=2)),
    ("moe", TrainLayout(dp=2, ep=2, pp=2)),
    ("moe_mixed", TrainLayout(pp=2)),
]
POLICY = LossOptions(kind="policy_gradient", clip_low=0.5, clip_high=0.5, entropy_coef=0.01)
ADAM = OptimizerOptions(learning_rate=0.005, weight_decay=0.1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("megatron")
    for name, config in MODELS.items():
        initialise_checkpoint(config, root / name, seed=0)
    return root


def run_megatron(rank: int, rendezvous: str | None, options: dict[str, Any], moe_layers: int) -> dict[str, Any]:
    """One rank: score, step twice, and say what came of it."""
    cuda_stand_ins.install()
    from miles_plan.backends.megatron_engine.train_engine import MegatronTrainEngine

    engine = MegatronTrainEngine(MegatronEngineOptions(**options), rank=rank, rendezvous=rendezvous)
    found = measure(engine, moe_layers)
    found["exported"] = [t.name for bucket in engine.export_weights(1, bucket_bytes=20_000) for t in bucket.tensors]
    engine.release_weights(1)
    saved = engine.save(Path(options["host_directory"]) / "state")
    once_more = step(engine, moe_layers)
    engine.load(Path(options["host_directory"]) / "state")
    found["resumed"] = step(engine, moe_layers) == once_more
    found["saved"] = saved
    engine.close()
    return found


def step(engine: Any, moe_layers: int) -> dict[str, float]:
    batch = random_batch(moe_layers=moe_layers)
    return dict(engine.train_step(batch, loss=POLICY, optimizer=ADAM, replay_routing=bool(moe_layers), temperature=0.8))


def measure(engine: Any, moe_layers: int) -> dict[str, Any]:
    replay = bool(moe_layers)
    batch = random_batch(moe_layers=moe_layers)
    before = engine.weights_sha256()
    scored = engine.log_probs(batch, model="policy", temperature=0.8, replay_routing=replay)
    steps = [step(engine, moe_layers) for _ in range(2)]
    after = engine.log_probs(batch, model="policy", temperature=0.8, replay_routing=replay)
    return {"before": before, "scored": scored, "steps": steps, "after": after}


@pytest.mark.parametrize(("model", "layout"), CASES, ids=lambda each: str(each).replace(" ", "_"))
def test_a_layout_computes_what_one_embedded_rank_does(model, layout, checkpoints, ranks, tmp_path):
    cuda_stand_ins.need_megatron()
    moe_layers = MOE_LAYERS.get(model, 0)
    directory = checkpoints / model
    options = {"model_directory": directory, "host_directory": tmp_path / "mcore", "layout": layout, "dtype": "float32"}
    options |= {"device": "cpu", "micro_batch_tokens": 30}
    found = ranks.run(run_megatron, layout.world_size, options, moe_layers)
    embedded = TorchTrainEngine(
        TrainEngineOptions(model_directory=directory, host_directory=tmp_path / "torch", micro_batch_tokens=30)
    )
    expected = measure(embedded, moe_layers)
    embedded.close()
    batch = random_batch(moe_layers=moe_layers)

    assert {each["before"] for each in found} == {expected["before"]}
    for when in ("scored", "after"):
        ours, theirs = (in_batch_order(batch, list(each)) for each in ([f[when] for f in found], [expected[when]]))
        np.testing.assert_allclose(ours, theirs, atol=1e-5 if when == "scored" else 2e-4)
        for count in ("routing_mismatches", "routing_compared"):
            assert sum(getattr(each[when], count) for each in found) == pytest.approx(getattr(expected[when], count), abs=2)
    for each in found:
        assert each["resumed"]
        assert each["steps"] == found[0]["steps"]
        for ours, theirs in zip(each["steps"], expected["steps"], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    assert len(found[0]["exported"]) == len(set(found[0]["exported"]))
    assert not any(each["exported"] for each in found[1:])
