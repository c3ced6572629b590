"""What every rollout engine must do, by its protocol; a suite over `engines`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from miles_plan.backends.engine import EngineError, Request, RolloutEngine
from miles_plan.data.batch import SampleBatch, ragged_rows
from miles_plan.ir.options import LossOptions, OptimizerOptions, SamplingOptions

OPTIONS = SamplingOptions(max_response_tokens=10, temperature=0.9, stop_token_ids=(2, 3, 4, 5), seed=11)


def requests(count: int = 12) -> list[Request]:
    """Four samples a prompt."""
    prompts = [tuple(np.random.default_rng(i).integers(6, 41, size=2 + 5 * i).tolist()) for i in range(-(-count // 4))]
    return [Request(sample_id=50 + i, prompt_id=i // 4, prompt=prompts[i // 4]) for i in range(count)]


def texts(batch: SampleBatch) -> dict[int, tuple[list[int], list[float]]]:
    """Response tokens and log-probs by sample id."""
    return {
        int(batch.sample_id[i]): (
            batch.response(i).tolist(),
            batch.rollout_log_probs[int(batch.response_start[i]) :][: int(batch.response_length[i])].tolist(),
        )
        for i in range(batch.num_samples)
    }


def test_it_speaks_the_protocol(engines):
    assert isinstance(engines.rollout(), RolloutEngine)


def test_a_batch_is_sound_and_in_request_order(engines):
    asked = requests()
    batch = engines.rollout().generate(asked, OPTIONS, min_version=0)
    assert batch.problems() == []
    assert batch.sample_id.tolist() == [request.sample_id for request in asked]
    assert batch.prompt_id.tolist() == [request.prompt_id for request in asked]
    for index, request in enumerate(asked):
        assert tuple(batch.sequence(index)[: int(batch.prompt_length[index])].tolist()) == request.prompt
        response = batch.response(index).tolist()
        assert 1 <= len(response) <= OPTIONS.max_response_tokens
        assert batch.stopped[index] == (response[-1] in OPTIONS.stop_token_ids)
        assert batch.stopped[index] or len(response) == OPTIONS.max_response_tokens
        assert not set(response[:-1]) & set(OPTIONS.stop_token_ids)
    assert (batch.rollout_log_probs <= 0).all()
    assert np.isfinite(batch.rollout_log_probs).all()
    assert (batch.weight_version == 0).all()
    assert len({tuple(response) for response, _ in texts(batch).values()}) > 6


def test_routing_covers_every_token_that_was_fed(engines):
    batch = engines.rollout().generate(requests(), OPTIONS, min_version=0)
    if engines.model == "dense":
        assert batch.routing is None
        return
    assert batch.routing.dtype == np.uint8
    assert batch.routing.shape == (batch.num_tokens, 2, 2)
    assert batch.routing.max() < 8
    last = batch.start + batch.length - 1
    assert (batch.routing[last] == 0).all()
    fed = np.delete(batch.routing, last, axis=0)
    assert (fed[..., 0] != fed[..., 1]).all()  # two experts of a token are two


def test_a_sample_depends_on_its_seed_and_id_alone(engines):
    engine = engines.rollout()
    whole = texts(engine.generate(requests(), OPTIONS, min_version=0))
    assert texts(engine.generate(requests(), OPTIONS, min_version=0)) == whole
    other_seed = texts(engine.generate(requests(), replace(OPTIONS, seed=12), min_version=0))
    assert other_seed != whole
    if engines.exact:
        backwards = [requests()[index] for index in (7, 3, 11)]
        alone = texts(engine.generate(backwards, OPTIONS, min_version=0))
        assert alone == {request.sample_id: whole[request.sample_id] for request in backwards}


def test_temperature_zero_is_greedy(engines):
    found = texts(engines.rollout().generate(requests(), replace(OPTIONS, temperature=0.0), min_version=0))
    assert all(found[50 + i] == found[50 + 4 * (i // 4)] for i in range(12))


def test_sampling_filters_narrow_the_choice(engines):
    engine = engines.rollout()
    greedy = texts(engine.generate(requests(), replace(OPTIONS, temperature=0.0), min_version=0))
    for filtered in (replace(OPTIONS, top_k=1), replace(OPTIONS, top_p=1e-6)):
        found = texts(engine.generate(requests(), filtered, min_version=0))
        assert {key: tokens for key, (tokens, _) in found.items()} == {key: tokens for key, (tokens, _) in greedy.items()}


def test_no_requests_give_an_empty_batch(engines):
    batch = engines.rollout().generate([], OPTIONS, min_version=0)
    assert batch.num_samples == 0
    assert batch.problems() == []


def test_a_request_that_cannot_be_is_refused_and_named(engines):
    engine = engines.rollout()
    for prompt in ((), (7,) * 60, (99,)):
        with pytest.raises(EngineError, match="77"):
            engine.generate([Request(sample_id=77, prompt_id=0, prompt=prompt)], OPTIONS, min_version=0)
    assert engine.generate(requests(4), OPTIONS, min_version=0).num_samples == 4


def test_weights_older_than_asked_for_are_refused(engines):
    with pytest.raises(EngineError, match="version 3"):
        engines.rollout().generate(requests(), OPTIONS, min_version=3)


def test_new_weights_are_served_once_all_are_in(engines):
    trainer, engine = engines.trainer(), engines.rollout()
    batch = engine.generate(requests(), OPTIONS, min_version=0)
    loss, optimizer = LossOptions(kind="sft"), OptimizerOptions(learning_rate=0.02)
    trainer.train_step(batch, loss=loss, optimizer=optimizer, replay_routing=False)
    buckets = list(trainer.export_weights(1, bucket_bytes=8_000))
    assert len(buckets) > 2
    for bucket in buckets[:-1]:
        engine.update_weights(bucket)
    with pytest.raises(EngineError):  # neither the old weights nor the new ones are whole
        engine.generate(requests(), OPTIONS, min_version=0)
    with pytest.raises(EngineError, match="did not arrive"):
        engine.commit_weights(1)
    engine.update_weights(buckets[-1])
    assert engine.commit_weights(1) == 1
    trainer.release_weights(1)
    fresh = engine.generate(requests(), OPTIONS, min_version=1)
    assert (fresh.weight_version == 1).all()
    assert texts(fresh) != texts(batch)

    found = trainer.log_probs(fresh, model="policy", temperature=0.9, replay_routing=fresh.routing is not None)
    index = found.sample_index
    rows = ragged_rows(fresh.response_start[index], fresh.response_length[index])
    difference = np.abs(found.log_probs - fresh.rollout_log_probs[rows]).max()
    assert difference == 0.0 if engines.exact else difference < 0.05
    if engines.exact:
        assert found.routing_mismatches == 0


def test_bytes_that_changed_on_the_way_are_refused(engines):
    trainer, engine = engines.trainer(), engines.rollout()
    [bucket] = trainer.export_weights(1, bucket_bytes=1 << 30)
    first = replace(bucket.tensors[0], checksum="0" * 16)
    with pytest.raises(EngineError, match=first.name):
        engine.update_weights(replace(bucket, tensors=(first, *bucket.tensors[1:])))
    trainer.release_weights(1)
    with pytest.raises(EngineError, match="version 1"):
        engine.update_weights(bucket)


def test_a_sleeping_engine_frees_memory_and_refuses_to_generate(engines):
    trainer, engine = engines.trainer(), engines.rollout()
    before = texts(engine.generate(requests(), OPTIONS, min_version=0))
    awake = engine.health()["device_bytes"]
    asleep = engine.sleep(["weights", "kv_cache"])
    assert all(asleep.device_bytes[part] < awake[part] for part in ("weights", "kv_cache"))
    with pytest.raises(EngineError, match="wake"):
        engine.generate(requests(), OPTIONS, min_version=0)
    engine.wake(["weights", "kv_cache"])
    with pytest.raises(EngineError):  # the weights were dropped
        engine.generate(requests(), OPTIONS, min_version=0)
    for bucket in trainer.export_weights(1, bucket_bytes=1 << 30):
        engine.update_weights(bucket)
    engine.commit_weights(1)
    assert texts(engine.generate(requests(), OPTIONS, min_version=1)) == before  # an untrained trainer has the same weights


def test_the_cache_alone_may_sleep(engines):
    engine = engines.rollout()
    before = texts(engine.generate(requests(), OPTIONS, min_version=0))
    engine.sleep(["kv_cache"])
    engine.wake(["kv_cache"])
    assert texts(engine.generate(requests(), OPTIONS, min_version=0)) == before


def test_health_tells_version_load_and_memory(engines):
    health = engines.rollout().health()
    assert health["weight_version"] == 0
    assert health["running"] == 0
    assert health["device_bytes"]["weights"] > 0
