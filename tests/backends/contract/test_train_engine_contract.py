"""What every trainer must do, by its protocol; a suite over `engines`."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest

from miles_plan.backends.engine import DeviceWeightSource, EngineError, TrainEngine
from miles_plan.data.batch import Array, SampleBatch, ragged_rows
from miles_plan.ir.options import LossOptions, OptimizerOptions

SFT = LossOptions(kind="sft")
POLICY = LossOptions(kind="policy_gradient")
ADAM = OptimizerOptions(learning_rate=0.005)


@pytest.fixture
def batch(engines) -> SampleBatch:
    """Ten samples of two prompts with random answers, one of them empty, and random routing for a mixture of experts."""
    draw = np.random.default_rng(0)
    prompt_length = np.repeat(draw.integers(1, 6, size=2), 5).astype(np.int32)
    response_length = draw.integers(1, 9, size=10).astype(np.int32)
    response_length[4] = 0
    length = prompt_length + response_length
    count = int(response_length.sum())
    routing = None
    if engines.model == "moe":
        order = np.argsort(draw.random((int(length.sum()), 2, 8)), axis=-1)
        routing = order[..., :2].astype(np.uint8)
    return SampleBatch(
        sample_id=np.arange(10, dtype=np.int64),
        prompt_id=np.repeat(np.arange(2), 5),
        tokens=draw.integers(3, 41, size=int(length.sum())).astype(np.int32),
        prompt_length=prompt_length,
        length=length,
        stopped=np.ones(10, dtype=bool),
        rollout_log_probs=np.zeros(count, dtype=np.float32),
        weight_version=np.zeros(count, dtype=np.int32),
        routing=routing,
    )


def score(engine: TrainEngine, batch: SampleBatch, **options: Any) -> Array:
    """Log-probs in the batch's order."""
    settings = {"model": "policy", "temperature": 0.8, "replay_routing": batch.routing is not None} | options
    found = engine.log_probs(batch, **settings)
    flat = np.full(len(batch.rollout_log_probs), np.nan, dtype=np.float32)
    index = found.sample_index
    flat[ragged_rows(batch.response_start[index], batch.response_length[index])] = found.log_probs
    return flat


def train(engine: TrainEngine, batch: SampleBatch, loss: LossOptions = SFT) -> dict[str, float]:
    return dict(engine.train_step(batch, loss=loss, optimizer=ADAM, replay_routing=batch.routing is not None))


def test_it_speaks_the_protocol(engines):
    assert isinstance(engines.trainer(), TrainEngine)


def test_every_response_token_gets_one_log_prob(engines, batch):
    found = engines.trainer().log_probs(batch, model="policy", temperature=1.0, replay_routing=False)
    assert found.log_probs.dtype == found.entropy.dtype == np.float32
    assert found.sample_index.dtype == np.int64
    assert len(set(found.sample_index.tolist())) == len(found.sample_index)
    assert int(batch.response_length[found.sample_index].sum()) == len(found.log_probs) == len(found.entropy)
    assert set(np.flatnonzero(batch.response_length > 0)) <= set(found.sample_index.tolist())
    assert (found.log_probs <= 0).all()
    assert ((found.entropy >= 0) & (found.entropy <= math.log(41) + 1e-5)).all()


def test_scoring_twice_gives_the_same_bits_and_temperature_matters(engines, batch):
    engine = engines.trainer()
    first = score(engine, batch)
    assert (score(engine, batch) == first).all()
    assert (score(engine, batch, temperature=2.0) != first).any()
    assert (score(engine, batch, temperature=0.0) == score(engine, batch, temperature=1.0)).all()


def test_replay_counts_every_token_and_layer_once(engines, batch):
    engine = engines.trainer()
    found = engine.log_probs(batch, model="policy", temperature=1.0, replay_routing=batch.routing is not None)
    if batch.routing is None:
        assert (found.routing_mismatches, found.routing_compared) == (0, 0)
        return
    answered = batch.response_length > 0
    assert found.routing_compared == 2 * int((batch.length - 1)[answered].sum())
    assert 0 < found.routing_mismatches <= found.routing_compared  # random experts are seldom the router's own
    assert (score(engine, batch) != score(engine, batch, replay_routing=False)).any()


def test_the_reference_does_not_learn(engines, batch):
    engine = engines.trainer()
    before = score(engine, batch, model="reference")
    assert (before == score(engine, batch)).all()
    train(engine, batch)
    assert (score(engine, batch, model="reference") == before).all()
    assert (score(engine, batch) != before).any()


def test_a_snapshot_makes_the_policy_the_reference(engines, batch):
    engine = engines.trainer()
    train(engine, batch)
    engine.snapshot_reference()
    learned = score(engine, batch)
    train(engine, batch)
    assert (score(engine, batch, model="reference") == learned).all()


def test_the_hash_tells_weights_apart_and_nothing_else(engines, batch):
    engine, other = engines.trainer(), engines.trainer()
    initial = engine.weights_sha256()
    assert len(initial) == 64
    score(engine, batch)
    assert engine.weights_sha256() == other.weights_sha256() == initial
    train(engine, batch)
    assert engine.weights_sha256() != initial


def test_an_exported_checkpoint_is_a_model_to_start_from(engines, batch, tmp_path):
    engine = engines.trainer()
    train(engine, batch)
    files = engine.export_checkpoint(tmp_path / "model")
    assert {"config.json", "model.safetensors"} <= set(files)
    assert all((tmp_path / "model" / file).is_file() for file in files)
    with pytest.raises(EngineError, match="exists already"):
        engine.export_checkpoint(tmp_path / "model")
    restarted = engines.make_trainer(tmp_path / "model", tmp_path / "host")
    assert restarted.weights_sha256() == engine.weights_sha256()
    restarted.close()


def test_a_model_that_is_not_held_is_refused(engines, batch):
    with pytest.raises(EngineError, match="teacher"):
        score(engines.trainer(), batch, model="teacher")


def test_supervised_steps_lower_the_loss(engines, batch):
    engine = engines.trainer()
    metrics = [train(engine, batch) for _ in range(8)]
    for each in metrics:
        assert {"loss", "grad_norm", "learning_rate", "skipped_steps"} <= each.keys()
        assert all(isinstance(value, float) and math.isfinite(value) for value in each.values())
        assert each["skipped_steps"] == 0.0
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.2


def test_policy_steps_follow_the_advantage(engines, batch):
    engine = engines.trainer()
    old = score(engine, batch, temperature=1.0)
    advantage = np.repeat(np.where(np.arange(10) % 2, 1.0, -1.0), batch.response_length).astype(np.float32)
    train(engine, batch.with_columns(advantage=advantage, old_log_probs=old), POLICY)
    assert ((score(engine, batch, temperature=1.0) - old) * advantage).mean() > 0


def test_a_policy_step_without_its_columns_names_them(engines, batch):
    with pytest.raises(EngineError, match="'advantage', 'old_log_probs'"):
        train(engines.trainer(), batch, POLICY)


def test_gradients_that_are_not_finite_change_nothing(engines, batch):
    engine = engines.trainer()
    old = score(engine, batch)
    advantage = np.full(len(old), np.inf, dtype=np.float32)
    metrics = train(engine, batch.with_columns(advantage=advantage, old_log_probs=old), POLICY)
    assert metrics["skipped_steps"] == 1.0
    assert (score(engine, batch) == old).all()


def test_exported_buckets_are_complete_ordered_and_bounded(engines, batch):
    from safetensors import safe_open

    engine = engines.trainer()
    buckets = list(engine.export_weights(5, bucket_bytes=10_000))
    assert [bucket.index for bucket in buckets] == list(range(len(buckets)))
    assert [bucket.last for bucket in buckets] == [False] * (len(buckets) - 1) + [True]
    assert {bucket.version for bucket in buckets} == {5}
    for bucket in buckets:
        assert len(bucket.tensors) == 1 or sum(tensor.size_bytes for tensor in bucket.tensors) <= 10_000
    tensors = {tensor.name: tensor for bucket in buckets for tensor in bucket.tensors}
    with safe_open(engines.directory / "model.safetensors", framework="np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    engine.release_weights(5)

    again = {t.name: t.checksum for bucket in engine.export_weights(6, bucket_bytes=1 << 30) for t in bucket.tensors}
    assert again == {name: tensor.checksum for name, tensor in tensors.items()}
    engine.release_weights(6)
    train(engine, batch)
    trained = {t.name: t.checksum for bucket in engine.export_weights(7, bucket_bytes=1 << 30) for t in bucket.tensors}
    engine.release_weights(7)
    assert all(trained[name] != checksum for name, checksum in again.items() if "_proj" in name and "experts" not in name)


def test_streamed_weights_are_those_that_are_exported(engines, batch):
    engine = engines.trainer()
    if not isinstance(engine, DeviceWeightSource):
        pytest.skip("weights of this trainer go through shared memory only")
    train(engine, batch)
    exported = {t.name: t.checksum for bucket in engine.export_weights(1, bucket_bytes=1 << 30) for t in bucket.tensors}
    layouts, streamed = [], {}
    for bucket in engine.stream_weights(1, bucket_bytes=10_000):
        layouts.append(bucket.layout)
        for each in bucket.layout.tensors:
            raw = bucket.data[each.offset_bytes : each.offset_bytes + each.size_bytes]
            streamed[each.name] = hashlib.sha256(bytes(raw.tolist())).hexdigest()[:16]
    engine.release_weights(1)
    assert tuple(layouts) == engine.weight_layout(bucket_bytes=10_000)
    assert all(layout.size_bytes <= 10_000 or len(layout.tensors) == 1 for layout in layouts)
    assert streamed == exported
    engine.offload(["weights"])
    with pytest.raises(EngineError, match="onload"):
        next(engine.stream_weights(2, bucket_bytes=10_000))


def test_offload_frees_the_device_and_onload_restores_it(engines, batch):
    engine, untouched = engines.trainer(), engines.trainer()
    parts = ["weights", "gradients", "optimizer", "reference"]
    before = engine.memory()
    for _ in range(2):  # the second time is a no-op
        after = engine.offload(parts)
        assert all(after.device_bytes[part] < before.device_bytes[part] for part in parts)
        assert all(after.host_bytes[part] > 0 for part in parts if part != "gradients")
    with pytest.raises(EngineError, match="onload"):
        train(engine, batch)
    for _ in range(2):
        after = engine.onload(parts)
        assert all(after.host_bytes.get(part, 0) == 0 for part in parts)
    assert train(engine, batch) == train(untouched, batch)
    assert (score(engine, batch) == score(untouched, batch)).all()


def test_load_restores_what_save_wrote(engines, batch, tmp_path):
    engine = engines.trainer()
    train(engine, batch)
    names = engine.save(tmp_path / "state")
    assert names
    assert all((tmp_path / "state" / name).is_file() for name in names)
    expected = [train(engine, batch), train(engine, batch)], score(engine, batch).tolist()
    for other in (engine, engines.trainer()):
        other.load(tmp_path / "state")
        assert ([train(other, batch), train(other, batch)], score(other, batch).tolist()) == expected


def test_load_names_the_file_that_is_missing_or_broken(engines, tmp_path):
    engine = engines.trainer()
    with pytest.raises(EngineError, match="nowhere"):
        engine.load(tmp_path / "nowhere")
    [name, *_] = engine.save(tmp_path / "state")
    path = tmp_path / "state" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(EngineError, match=name):
        engine.load(tmp_path / "state")
