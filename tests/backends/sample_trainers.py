"""Tiny models and batches for trainer tests, and what a trainer makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from miles_plan.backends.engine import RankLogProbs
from miles_plan.data.batch import Array, SampleBatch, ragged_rows
from miles_plan.ir.options import LossOptions, OptimizerOptions

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
POLICY = LossOptions(kind="policy_gradient", clip_low=0.5, clip_high=0.5, entropy_coef=0.01)
ADAM = OptimizerOptions(learning_rate=0.005, weight_decay=0.1)


def random_batch(*, samples: int = 10, moe_layers: int = 0, experts: int = 8, topk: int = 2, seed: int = 0) -> SampleBatch:
    """Samples of two prompts with random answers, the fifth empty; with moe_layers, random experts for every token."""
    draw = np.random.default_rng(seed)
    prompt_length = np.repeat(draw.integers(1, 6, size=2), samples // 2).astype(np.int32)
    response_length = draw.integers(1, 9, size=samples).astype(np.int32)
    response_length[4] = 0
    length = prompt_length + response_length
    total, count = int(length.sum()), int(response_length.sum())
    routing = None
    if moe_layers:
        routing = np.argsort(draw.random((total, moe_layers, experts)), axis=-1)[..., :topk].astype(np.uint8)
    batch = SampleBatch(
        sample_id=np.arange(samples, dtype=np.int64),
        prompt_id=np.repeat(np.arange(2), samples // 2),
        tokens=draw.integers(3, 41, size=total).astype(np.int32),
        prompt_length=prompt_length,
        length=length,
        stopped=np.ones(samples, dtype=bool),
        rollout_log_probs=np.zeros(count, dtype=np.float32),
        weight_version=np.zeros(count, dtype=np.int32),
        routing=routing,
    )
    advantage = np.repeat(np.where(np.arange(samples) % 2, 1.0, -1.0), response_length).astype(np.float32)
    return batch.with_columns(advantage=advantage, old_log_probs=np.full(count, -3.7, dtype=np.float32))


def in_batch_order(batch: SampleBatch, found: list[RankLogProbs]) -> Array:
    """What ranks scored, flat in the batch's order, [2, R]: log-probs and entropies; NaN where nobody did."""
    flat = np.full((2, len(batch.rollout_log_probs)), np.nan, dtype=np.float32)
    for each in found:
        index = each.sample_index
        rows = ragged_rows(batch.response_start[index], batch.response_length[index])
        flat[:, rows] = np.stack([each.log_probs, each.entropy])
    return flat


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


def reference_on_the_host(engine: Any, options: Any, directory: Path, scratch: Path) -> None:
    """A trainer with `reference_offload` does what one without does, and holds no reference on its device in between."""
    batch = random_batch(moe_layers=2)
    found = []
    for offload in (False, True):
        settings = {"host_directory": scratch / str(offload), "dtype": "float32", "device": "cpu", "keep_reference": True}
        one = engine(options(model_directory=directory, reference_offload=offload, **settings))
        step(one, 2)
        scores = [one.log_probs(batch, model="reference", temperature=1.0, replay_routing=True).log_probs]
        one.snapshot_reference()
        one.save(scratch / f"state{offload}")
        step(one, 2)
        one.load(scratch / f"state{offload}")
        scores += [
            one.log_probs(batch, model=model, temperature=1.0, replay_routing=True).log_probs
            for model in ("reference", "policy")
        ]
        assert (scores[1] == scores[2]).all()
        memory = one.memory()
        assert (memory.device_bytes["reference"] == 0) == offload
        assert (memory.host_bytes.get("reference", 0) > 0) == offload
        found.append(scores)
        one.close()
    assert all((a == b).all() for a, b in zip(*found, strict=True))


def optimizer_on_the_host(engine: Any, options: Any, directory: Path, scratch: Path) -> None:
    """A trainer with `optimizer_offload` trains, saves and loads like one without, and holds no moments in between."""
    found = []
    for offload in (False, True):
        settings = {"host_directory": scratch / str(offload), "dtype": "bfloat16", "device": "cpu"}
        one = engine(options(model_directory=directory, optimizer_offload=offload, **settings))
        step(one, 0)
        one.save(scratch / f"state{offload}")
        steps = [step(one, 0) for _ in range(2)]
        one.load(scratch / f"state{offload}")
        assert [step(one, 0) for _ in range(2)] == steps
        memory = one.memory()
        assert (memory.device_bytes["optimizer"] == 0) == offload
        assert (memory.host_bytes.get("optimizer", 0) > 0) == offload
        found.append((steps, one.weights_sha256()))
        one.close()
    assert found[0] == found[1]
