"""Layers of our kernels in the engine: log-probs do not depend on the layout. With Megatron-core, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles_plan.backends.megatron_engine.options import MegatronEngineOptions
from miles_plan.backends.torch_engine.weights import initialise_checkpoint
from miles_plan.ir.layout import TrainLayout
from miles_plan.ir.options import LossOptions, OptimizerOptions
from tests.backends.megatron_engine import cuda_stand_ins
from tests.backends.sample_trainers import MODELS, MOE_LAYERS, in_batch_order, random_batch, step

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "vocab_size": 128, "initializer_range": 0.05}
CASES = {
    "dense": [TrainLayout(tp=2), TrainLayout(tp=2, sequence_parallel=True), TrainLayout(pp=2)],
    "moe": [TrainLayout(tp=2, sequence_parallel=True, ep=2), TrainLayout(dp=2, ep=2)],
}


def run_rank(rank: int, rendezvous: str | None, options: dict[str, Any], moe_layers: int) -> tuple[Any, dict[str, float]]:
    cuda_stand_ins.install()
    from miles_plan.backends.megatron_engine.train_engine import MegatronTrainEngine

    engine = MegatronTrainEngine(MegatronEngineOptions(**options), rank=rank, rendezvous=rendezvous)
    batch = random_batch(moe_layers=moe_layers)
    scored = engine.log_probs(batch, model="policy", temperature=0.8, replay_routing=bool(moe_layers))
    metrics = step(engine, moe_layers)
    engine.close()
    return scored, metrics


@pytest.mark.parametrize("model", CASES)
def test_layouts_give_the_bits_of_one_rank(model, ranks, tmp_path: Path):
    cuda_stand_ins.need_megatron()
    moe_layers = MOE_LAYERS.get(model, 0)
    config = {**MODELS[model], **SIZES, **({"moe_intermediate_size": 128} if moe_layers else {})}
    initialise_checkpoint(config, tmp_path / "model", seed=0)
    options = {"model_directory": tmp_path / "model", "host_directory": tmp_path, "micro_batch_tokens": 30, "device": "cpu"}
    options |= {"dtype": "bfloat16", "layer_spec": "batch_invariant"}
    batch = random_batch(moe_layers=moe_layers)
    [(alone, expected)] = ranks.run(run_rank, 1, options, moe_layers)
    for layout in CASES[model]:
        found = ranks.run(run_rank, layout.world_size, {**options, "layout": layout}, moe_layers)
        ours, theirs = in_batch_order(batch, [each for each, _ in found]), in_batch_order(batch, [alone])
        assert (ours[0] == theirs[0]).all(), str(layout)
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
        for _, metrics in found:
            assert metrics == pytest.approx(expected, rel=2e-2, abs=2e-3)


def gradient_norms(rank: int, rendezvous: str | None, options: dict[str, Any], coefficients: list[float]) -> list[float]:
    cuda_stand_ins.install()
    from miles_plan.backends.megatron_engine.train_engine import MegatronTrainEngine

    batch = random_batch(moe_layers=0)
    found = []
    for coefficient in coefficients:
        engine = MegatronTrainEngine(MegatronEngineOptions(**options), rank=rank, rendezvous=rendezvous)
        loss = LossOptions(kind="policy_gradient", entropy_coef=coefficient)
        metrics = engine.train_step(batch, loss=loss, optimizer=OptimizerOptions(learning_rate=1e-3), replay_routing=False)
        found.append(metrics["grad_norm"])
        engine.close()
    return found


def test_a_loss_with_entropy_has_its_gradient(ranks, tmp_path: Path):
    """Exact log-probs and entropies come from two passes over the logits, of which the second has a gradient only if asked."""
    cuda_stand_ins.need_megatron()
    initialise_checkpoint({**MODELS["dense"], **SIZES}, tmp_path / "model", seed=0)
    options = {"model_directory": tmp_path / "model", "host_directory": tmp_path, "micro_batch_tokens": 30, "device": "cpu"}
    options |= {"dtype": "bfloat16"}
    coefficients = [0.0, 2.0]
    [exact] = ranks.run(gradient_norms, 1, {**options, "layer_spec": "batch_invariant"}, coefficients)
    [local] = ranks.run(gradient_norms, 1, {**options, "layer_spec": "local"}, coefficients)
    assert exact == pytest.approx(local, rel=2e-2)
    assert abs(exact[1] / exact[0] - 1) > 0.1, "entropy shows in the norm, so its gradient is there"
