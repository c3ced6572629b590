"""Any number of ranks computes what one rank of the embedded trainer does, on the CPU over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles_plan.backends.fsdp_engine.options import FsdpEngineOptions
from miles_plan.backends.fsdp_engine.train_engine import FsdpTrainEngine
from miles_plan.backends.torch_engine.options import TrainEngineOptions
from miles_plan.backends.torch_engine.train_engine import TorchTrainEngine
from miles_plan.backends.torch_engine.weights import initialise_checkpoint
from miles_plan.ir.layout import TrainLayout
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

CASES = [("dense", 2, "none"), ("tied", 2, "full"), ("biased", 3, "selective"), ("moe", 2, "full"), ("moe_mixed", 1, "none")]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fsdp")
    for name, config in MODELS.items():
        initialise_checkpoint(config, root / name, seed=0)
    return root


def run_fsdp(rank: int, rendezvous: str, options: dict[str, Any], moe_layers: int) -> dict[str, Any]:
    """One rank: score, step twice, stream, save, and say what came of it."""
    engine = FsdpTrainEngine(FsdpEngineOptions(**options), rank=rank, rendezvous=rendezvous)
    found = measure(engine, moe_layers)
    buckets = [(each.layout, each.data.clone().numpy()) for each in engine.stream_weights(1, bucket_bytes=20_000)]
    found["layouts_agree"] = tuple(layout for layout, _ in buckets) == engine.weight_layout(bucket_bytes=20_000)
    found["streamed"] = [(layout.tensors, data.tobytes()) for layout, data in buckets]
    found["memory"] = engine.memory().device_bytes["weights"]
    state = Path(options["host_directory"]) / "state"
    found["saved"] = engine.save(state)
    once_more = step(engine, moe_layers)
    engine.load(state)
    found["resumed"] = step(engine, moe_layers) == once_more
    engine.close()
    return found


@pytest.mark.parametrize(("model", "dp", "recompute"), CASES)
def test_ranks_compute_what_one_embedded_rank_does(model, dp, recompute, checkpoints, ranks, tmp_path):
    moe_layers = MOE_LAYERS.get(model, 0)
    directory = checkpoints / model
    options = {"model_directory": directory, "host_directory": tmp_path / "fsdp", "layout": TrainLayout(dp=dp)}
    options |= {"dtype": "float32", "device": "cpu", "micro_batch_tokens": 30, "recompute": recompute}
    found = ranks.run(run_fsdp, dp, options, moe_layers)
    embedded = TorchTrainEngine(
        TrainEngineOptions(model_directory=directory, host_directory=tmp_path / "torch", micro_batch_tokens=30)
    )
    expected = measure(embedded, moe_layers)
    embedded.close()
    batch = random_batch(moe_layers=moe_layers)

    for when, tolerance in (("scored", 1e-5), ("after", 2e-3)):
        ours, theirs = (in_batch_order(batch, list(each)) for each in ([f[when] for f in found], [expected[when]]))
        np.testing.assert_allclose(ours, theirs, atol=tolerance)
        for count in ("routing_mismatches", "routing_compared"):
            assert sum(getattr(each[when], count) for each in found) == pytest.approx(getattr(expected[when], count), abs=2)
    for each in found:
        assert each["resumed"]
        assert each["layouts_agree"]
        assert each["steps"] == found[0]["steps"]
        assert each["before"] == found[0]["before"]
        assert each["streamed"] == found[0]["streamed"]
        for ours, theirs in zip(each["steps"], expected["steps"], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    assert max(each["memory"] for each in found) < 1.2 * sum(each["memory"] for each in found) / dp  # evenly sharded


def test_bfloat16_trains_on_float32_masters(checkpoints, tmp_path):
    engine = FsdpTrainEngine(
        FsdpEngineOptions(
            model_directory=checkpoints / "dense",
            host_directory=tmp_path,
            dtype="bfloat16",
            device="cpu",
            optimizer_offload=True,
        )
    )
    found = measure(engine, 0)
    assert engine.memory().device_bytes["optimizer"] == 0
    assert {each.dtype for bucket in engine.weight_layout(bucket_bytes=1 << 20) for each in bucket.tensors} == {"bfloat16"}
    assert found["steps"][1]["loss"] < found["steps"][0]["loss"]
    assert all(tensor.element_size() == 4 for tensor in engine._tensors_of_part("weights"))
    engine.close()


def test_an_optimizer_on_the_host_is_saved_like_one_on_the_device(checkpoints, tmp_path):
    optimizer_on_the_host(FsdpTrainEngine, FsdpEngineOptions, checkpoints / "dense", tmp_path)


def test_a_reference_on_the_host_scores_and_is_saved_like_one_on_the_device(checkpoints, tmp_path):
    reference_on_the_host(FsdpTrainEngine, FsdpEngineOptions, checkpoints / "moe_mixed", tmp_path)


def test_a_teacher_is_another_model(checkpoints, tmp_path):
    settings = {"host_directory": tmp_path, "dtype": "float32", "device": "cpu"}
    engine = FsdpTrainEngine(
        FsdpEngineOptions(model_directory=checkpoints / "dense", teacher_directory=checkpoints / "moe_mixed", **settings)
    )
    other = FsdpTrainEngine(FsdpEngineOptions(model_directory=checkpoints / "moe_mixed", **settings))
    batch = random_batch()
    ours = engine.log_probs(batch, model="teacher", temperature=1.0, replay_routing=False)
    assert (ours.log_probs == other.log_probs(batch, model="policy", temperature=1.0, replay_routing=False).log_probs).all()
    other.close()
    engine.close()


def test_layouts_other_than_data_parallel_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tp=2 \(allowed: 1; it shards over dp\); cp=2"):
        FsdpEngineOptions(model_directory=tmp_path, host_directory=tmp_path, layout=TrainLayout(tp=2, cp=2))


def test_a_checkpoint_that_does_not_match_the_config_is_named(checkpoints, tmp_path):
    import json
    import shutil

    shutil.copytree(checkpoints / "dense", tmp_path / "broken")
    path = tmp_path / "broken" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 16}))
    with pytest.raises(ValueError, match=r"the checkpoint has 'model\.embed_tokens\.weight' as \(41, 32\), the model wants"):
        FsdpTrainEngine(
            FsdpEngineOptions(model_directory=tmp_path / "broken", host_directory=tmp_path, dtype="float32", device="cpu")
        )
