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
from tests.backends.megatron_engine import cuda_stand_ins
from tests.backends.sample_trainers import (
    MODELS,
    MOE_LAYERS,
    in_batch_order,
    measure,
    optimizer_on_the_host,
    random_batch,
    reference_on_the_host,
    step,
)

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
    ("moe_mixed", TrainLayout(pp=2, vpp=2)),
]


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
        np.testing.assert_allclose(ours, theirs, atol=1e-5 if when == "scored" else 2e-3)
        for count in ("routing_mismatches", "routing_compared"):
            assert sum(getattr(each[when], count) for each in found) == pytest.approx(getattr(expected[when], count), abs=2)
    for each in found:
        assert each["resumed"]
        assert each["steps"] == found[0]["steps"]
        for ours, theirs in zip(each["steps"], expected["steps"], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    assert len(found[0]["exported"]) == len(set(found[0]["exported"]))
    assert not any(each["exported"] for each in found[1:])


@pytest.mark.parametrize(
    "recompute", [{"recompute": "full"}, {"recompute": "selective", "recompute_modules": ("moe", "core_attn")}]
)
def test_recomputing_layers_changes_no_bit_and_replays_the_same_experts(recompute, checkpoints, ranks, tmp_path):
    """Two stages, so that forwards run ahead of the backwards in which layers are recomputed."""
    cuda_stand_ins.need_megatron()
    options = {"model_directory": checkpoints / "moe", "layout": TrainLayout(pp=2), "dtype": "float32", "device": "cpu"}
    options |= {"micro_batch_tokens": 20}
    plain = ranks.run(run_megatron, 2, {**options, "host_directory": tmp_path / "plain"}, MOE_LAYERS["moe"])
    found = ranks.run(run_megatron, 2, {**options, **recompute, "host_directory": tmp_path / "again"}, MOE_LAYERS["moe"])
    for ours, theirs in zip(found, plain, strict=True):
        assert ours["steps"] == theirs["steps"]
        assert (ours["after"].log_probs == theirs["after"].log_probs).all()


def test_a_teacher_is_another_model(checkpoints, tmp_path):
    cuda_stand_ins.need_megatron()
    from miles_plan.backends.megatron_engine.train_engine import MegatronTrainEngine

    settings: dict[str, Any] = {"host_directory": tmp_path, "dtype": "float32", "device": "cpu"}
    teacher = checkpoints / "moe_mixed"
    engine = MegatronTrainEngine(
        MegatronEngineOptions(model_directory=checkpoints / "dense", teacher_directory=teacher, **settings)
    )
    other = MegatronTrainEngine(MegatronEngineOptions(model_directory=teacher, **settings))
    batch = random_batch(moe_layers=2)
    ours = engine.log_probs(batch, model="teacher", temperature=1.0, replay_routing=True)
    theirs = other.log_probs(batch, model="policy", temperature=1.0, replay_routing=True)
    assert (ours.log_probs == theirs.log_probs).all()
    assert (ours.routing_mismatches, ours.routing_compared) == (theirs.routing_mismatches, theirs.routing_compared)
    other.close()
    engine.close()


def test_bfloat16_trains_on_float32_masters_that_may_live_on_the_host(checkpoints, tmp_path):
    cuda_stand_ins.need_megatron()
    from miles_plan.backends.megatron_engine.train_engine import MegatronTrainEngine

    engines = [
        MegatronTrainEngine(
            MegatronEngineOptions(
                model_directory=checkpoints / "tied",
                host_directory=tmp_path / str(offload),
                dtype="bfloat16",
                device="cpu",
                optimizer_offload=offload,
            )
        )
        for offload in (False, True)
    ]
    plain, offloaded = ([step(engine, 0) for _ in range(3)] for engine in engines)
    assert plain == offloaded
    assert plain[-1]["loss"] < plain[0]["loss"]
    kept, parked = (engine.memory() for engine in engines)
    assert kept.device_bytes["optimizer"] == parked.host_bytes["optimizer"] > 5 * kept.device_bytes["weights"]
    assert parked.device_bytes["optimizer"] == 0
    for engine in engines:
        engine.close()


def test_an_optimizer_on_the_host_is_saved_like_one_on_the_device(checkpoints, tmp_path):
    cuda_stand_ins.need_megatron()
    from miles_plan.backends.megatron_engine.train_engine import MegatronTrainEngine

    optimizer_on_the_host(MegatronTrainEngine, MegatronEngineOptions, checkpoints / "tied", tmp_path)


def test_a_reference_on_the_host_scores_and_is_saved_like_one_on_the_device(checkpoints, tmp_path):
    cuda_stand_ins.need_megatron()
    from miles_plan.backends.megatron_engine.train_engine import MegatronTrainEngine

    reference_on_the_host(MegatronTrainEngine, MegatronEngineOptions, checkpoints / "moe_mixed", tmp_path)
