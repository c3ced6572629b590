"""What crosses between engines and the rest is checked: samples, routing, log-probs, buckets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.backends.engine import EngineError, RankLogProbs, Request, WeightBucket, share_of_rank
from miles_plan.backends.executor.operations.advantage import advantages_of
from miles_plan.backends.executor.operations.batches import assembled
from miles_plan.backends.executor.operations.buffer import fresh_samples
from miles_plan.backends.executor.operations.digests import digest_of_batch
from miles_plan.backends.executor.operations.logprobs import compare_log_probs, differing_log_probs, joined_shares
from miles_plan.backends.executor.operations.publish import check_buckets
from miles_plan.backends.executor.operations.routing import pack_routing, routing_problems
from miles_plan.backends.executor.operations.samples import RefusedSamplesError, joined, sample_problems, share_of_engine
from miles_plan.backends.executor.operations.train_step import merged, updates_of
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.tasks import Advantage, RecordRouting

REQUESTS = [
    Request(sample_id=10 * prompt + number, prompt_id=prompt, prompt=(1, 2, 3)) for prompt in range(4) for number in range(2)
]
RECORD = RecordRouting(name="r", loop="rl", moe_layers=(0, 1), num_experts=4, topk=2, dtype="uint8", bytes_per_token=4)
CHECK: dict[str, Any] = {"version": 5, "vocab_size": 16, "max_response_tokens": 4, "routed": True}


def samples(requests: list[Request] = REQUESTS, version: int = 5) -> SampleBatch:
    """Sound samples for the requests, of different lengths."""
    rng = np.random.default_rng(0)
    lengths = np.array([3 + 1 + index % 4 for index in range(len(requests))], dtype=np.int32)
    tokens = [
        np.concatenate([request.prompt, rng.integers(0, 16, length - 3)])
        for request, length in zip(requests, lengths, strict=True)
    ]
    responses = int((lengths - 3).sum())
    routing = np.stack([rng.permutation(4)[:2] for _ in range(2 * int(lengths.sum()))]).reshape(-1, 2, 2).astype(np.uint8)
    routing[np.cumsum(lengths) - 1] = 0
    return SampleBatch(
        sample_id=np.array([request.sample_id for request in requests]),
        prompt_id=np.array([request.prompt_id for request in requests]),
        tokens=np.concatenate(tokens).astype(np.int32),
        prompt_length=np.full(len(requests), 3, dtype=np.int32),
        length=lengths,
        stopped=np.ones(len(requests), dtype=bool),
        rollout_log_probs=-rng.random(responses).astype(np.float32),
        weight_version=np.full(responses, version, dtype=np.int32),
        routing=routing,
    )


def test_sound_samples_pass() -> None:
    assert sample_problems(samples(), REQUESTS, **CHECK) == []
    assert routing_problems(samples(), RECORD) == []


def changed(array: str, index: int, value: Any) -> Callable[[SampleBatch], SampleBatch]:
    def change(batch: SampleBatch) -> SampleBatch:
        values = getattr(batch, array).copy()
        values[index] = value
        return replace(batch, **{array: values})

    return change


def shortened(array: str) -> Callable[[SampleBatch], SampleBatch]:
    return lambda batch: replace(batch, **{array: getattr(batch, array)[:-1]})


MUTATIONS: dict[str, Callable[[SampleBatch], SampleBatch]] = {
    "token above the vocabulary": changed("tokens", -1, 16),
    "token below zero": changed("tokens", -1, -1),
    "another prompt": changed("tokens", 0, 9),
    "prompt length": changed("prompt_length", 0, 2),
    "log-prob NaN": changed("rollout_log_probs", 0, np.nan),
    "log-prob above 0": changed("rollout_log_probs", 0, 0.5),
    "log-probs one short": shortened("rollout_log_probs"),
    "stale version": changed("weight_version", 0, 4),
    "versions one short": shortened("weight_version"),
    "tokens one short": shortened("tokens"),
    "length": changed("length", 0, 3),
    "sample ids repeat": changed("sample_id", 1, 0),
    "stopped one short": shortened("stopped"),
    "routing one short": shortened("routing"),
    "no routing": lambda batch: replace(batch, routing=None),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutated_batch_is_caught(mutation: str) -> None:
    assert sample_problems(MUTATIONS[mutation](samples()), REQUESTS, **CHECK)


def test_a_response_over_the_limit_is_caught() -> None:
    assert sample_problems(samples(), REQUESTS, **{**CHECK, "max_response_tokens": 3})


@given(engines=st.integers(1, 6), seed=st.integers(0, 99))
def test_shares_of_engines_join_to_the_requests_in_any_order(engines: int, seed: int) -> None:
    shares = [share_of_engine(REQUESTS, index, engines) for index in range(engines)]
    assert [request for share in shares for request in share] == REQUESTS
    whole = samples()
    parts = [whole.select([REQUESTS.index(request) for request in share]) for share in shares if share]
    np.random.default_rng(seed).shuffle(parts)  # type: ignore[arg-type]
    assert digest_of_batch(joined(parts, REQUESTS)) == digest_of_batch(whole)


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 6]])
def test_missing_and_repeated_samples_are_refused(rows: list[int]) -> None:
    with pytest.raises(RefusedSamplesError, match="8 samples were asked for"):
        joined([samples().select(rows)], REQUESTS)


@pytest.mark.parametrize(
    ("mutate", "expected"),
    [
        (lambda routing: routing[:, :1], "shape"),
        (lambda routing: routing[..., :1], "shape"),
        (lambda routing: np.where(routing == 3, 4, routing), "the model has 0..3"),
        (lambda routing: np.zeros_like(routing), "twice"),
    ],
)
def test_routing_of_a_wrong_shape_range_or_coverage_is_refused(mutate: Callable[[Any], Any], expected: str) -> None:
    batch = samples()
    with pytest.raises(RefusedSamplesError, match=expected):
        pack_routing(None, RECORD, replace(batch, routing=mutate(batch.routing)))


def test_recorded_routing_finds_its_samples_in_another_order() -> None:
    batch = samples()
    _, record = pack_routing(None, RECORD, batch)
    shuffled = batch.select([5, 0, 7])
    assert shuffled.routing is not None
    assert np.array_equal(record.of(shuffled), shuffled.routing)
    with pytest.raises(RefusedSamplesError, match="other lengths"):
        record.of(replace(shuffled, length=shuffled.length + 1))


def test_samples_that_a_filter_drew_later_bring_their_own_routing() -> None:
    batch = samples()
    _, record = pack_routing(None, RECORD, batch.select([0, 1]))
    found = assembled(batch, record, (), ())
    assert found.routing is not None
    assert np.array_equal(found.routing, batch.routing)  # type: ignore[arg-type]
    with pytest.raises(RefusedSamplesError, match="not recorded"):
        assembled(replace(batch, routing=None), record, (), ())


def shares(batch: SampleBatch, ranks: int) -> list[RankLogProbs]:
    found = []
    for rank in range(ranks):
        index = share_of_rank(batch.length, rank=rank, ranks=ranks)
        log_probs = batch.select(index).rollout_log_probs
        found.append(RankLogProbs(sample_index=index, log_probs=log_probs, entropy=-log_probs))
    return found


@given(ranks=st.integers(1, 5))
def test_shares_of_ranks_join_to_the_whole(ranks: int) -> None:
    batch = samples()
    log_probs, entropy = joined_shares(batch, shares(batch, ranks))
    assert np.array_equal(log_probs, batch.rollout_log_probs)
    assert np.array_equal(entropy, -batch.rollout_log_probs)


def test_a_sample_without_log_probs_or_with_two_is_an_error() -> None:
    batch = samples()
    found = shares(batch, 2)
    with pytest.raises(ValueError, match="4 samples without log-probs"):
        joined_shares(batch, found[:1])
    with pytest.raises(ValueError, match="4 with more than one"):
        joined_shares(batch, [*found, found[0]])


def test_comparison_looks_only_at_tokens_of_the_same_weights() -> None:
    batch = changed("weight_version", 0, 4)(samples())
    log_probs = batch.rollout_log_probs.copy()
    log_probs[0] += 1.0
    assert compare_log_probs(batch, log_probs, 5).max_abs_diff == 0.0
    assert compare_log_probs(batch, log_probs, 5).tokens_compared == len(log_probs) - 1
    log_probs[3] = np.nextafter(log_probs[3], np.float32(-9), dtype=np.float32)
    found = compare_log_probs(batch, log_probs, 5)
    assert found.mismatches == 1
    assert 0.0 < found.max_abs_diff < 1e-6
    assert (found.worst_sample, found.worst_token) == (10, 3 - int(batch.response_start[batch.sample_id == 10][0]))
    log_probs[5] = np.nan
    assert compare_log_probs(batch, log_probs, 5).max_abs_diff == np.inf


def test_a_trainer_that_repeats_itself_is_told_from_one_that_does_not() -> None:
    batch = samples()
    first = batch.rollout_log_probs.copy()
    first[2] = np.nan
    again = [replace(each, log_probs=each.log_probs.copy()) for each in shares(replace(batch, rollout_log_probs=first), 2)]
    assert differing_log_probs(None, batch, first, *again) == 0
    again[0].log_probs[0] = np.nextafter(again[0].log_probs[0], np.float32(-9), dtype=np.float32)
    assert differing_log_probs(None, batch, first, *again) == 1


@given(updates=st.integers(1, 6))
def test_updates_keep_prompts_whole_and_cover_the_batch(updates: int) -> None:
    parts = updates_of(samples(), updates)
    assert [int(each) for part in parts for each in part.sample_id] == [request.sample_id for request in REQUESTS]
    for part in parts:
        assert all((part.prompt_id == prompt).sum() == 2 for prompt in np.unique(part.prompt_id))


def test_metrics_of_updates_add_counts_and_average_the_rest() -> None:
    assert merged([{"loss": 1.0, "tokens": 3}, {"loss": 2.0, "tokens": 5}]) == {"loss": 1.5, "tokens": 8}


def test_a_dropped_reward_counts_nowhere() -> None:
    batch, rewards = samples(), np.array([0, 1, np.nan, 1, 0, 1, 1, 1], dtype=np.float32)
    _, advantages = advantages_of(None, Advantage(name="a", loop="rl", estimator="group"), batch, ("reward",), rewards)
    owner = np.repeat(np.arange(8), batch.response_length)
    assert np.isnan(advantages[owner == 2]).all()
    assert (advantages[owner == 3] == 0).all(), "its group has one sample left: nothing to compare"
    trained = assembled(batch, None, ("advantage",), (advantages,))
    assert np.array_equal(trained.columns["loss_mask"], owner != 2)
    assert np.isfinite(trained.columns["advantage"]).all()


def test_stale_samples_leave_the_buffer() -> None:
    batch = changed("weight_version", 0, 2)(samples())
    report, kept = fresh_samples(None, 5, 2, batch)
    assert report["figures"] == {"staleness_mean": 3 / 8, "staleness_max": 3, "samples_dropped_as_stale": 1}
    assert kept.num_samples == 7


def bucket(index: int, *, version: int = 1, last: bool = False) -> WeightBucket:
    return WeightBucket(transport="shared_memory", version=version, index=index, handle="", tensors=(), last=last)


def test_buckets_must_be_whole() -> None:
    check_buckets([bucket(0), bucket(1, last=True)], 1)
    for wrong in ([], [bucket(0)], [bucket(1, last=True)], [bucket(0), bucket(0, last=True)]):
        with pytest.raises(EngineError, match="not whole"):
            check_buckets(wrong, 1)
    with pytest.raises(EngineError, match="buckets of version"):
        check_buckets([bucket(0), bucket(1, version=2, last=True)], 1)
