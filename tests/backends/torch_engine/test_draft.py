"""The draft: its two forwards, what it learns, and that nothing of the policy depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles_plan.backends.engine import EngineError, Request, RolloutEngine
from miles_plan.backends.torch_engine.draft_decoder import accepted
from miles_plan.backends.torch_engine.options import RolloutEngineOptions, TrainEngineOptions
from miles_plan.backends.torch_engine.prepared import PreparedWeights
from miles_plan.backends.torch_engine.rollout_engine import TorchRolloutEngine
from miles_plan.backends.torch_engine.train_engine import TorchTrainEngine, _RoutingCount
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.options import LossOptions, OptimizerOptions, SamplingOptions

ADAM = OptimizerOptions(learning_rate=0.01)
FAMILIES = ["qwen3", "qwen3_tied", "qwen3_moe_mixed"]
FIELDS = ("sample_id", "prompt_id", "tokens", "prompt_length", "length", "stopped", "rollout_log_probs", "weight_version")


def requests(count: int = 12) -> list[Request]:
    draw = np.random.default_rng(0)
    prompts = [tuple(draw.integers(5, 41, size=draw.integers(1, 20)).tolist()) for _ in range(4)]
    return [Request(sample_id=100 + i, prompt_id=i // 4, prompt=prompts[i // 4]) for i in range(count)]


def sampling(**changed: Any) -> SamplingOptions:
    return SamplingOptions(**{"max_response_tokens": 14, "temperature": 0.7, "stop_token_ids": (2, 3, 4), "seed": 5, **changed})


def rollout(directory: Path, rank: int = 0, rendezvous: str | None = None, **options: Any) -> TorchRolloutEngine:
    given = {"kv_pool_tokens": 1024, "return_routing": "moe" in directory.name, **options}
    return TorchRolloutEngine(RolloutEngineOptions(model_directory=directory, **given), rank=rank, rendezvous=rendezvous)


def trainer(directory: Path, host: Path, rank: int = 0, rendezvous: str | None = None, **options: Any) -> TorchTrainEngine:
    given = {"draft": True, "seed": 3, **options}
    return TorchTrainEngine(
        TrainEngineOptions(model_directory=directory, host_directory=host, **given), rank=rank, rendezvous=rendezvous
    )


def assert_same(first: SampleBatch, second: SampleBatch) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    assert (first.routing is None) == (second.routing is None)
    if first.routing is not None:
        np.testing.assert_array_equal(first.routing, second.routing)


@pytest.fixture(scope="module")
def plain(checkpoint: Callable[[str], Path]) -> Callable[..., SampleBatch]:
    """What is sampled without a draft; made once for each family and sampling."""
    made: dict[Any, SampleBatch] = {}

    def batch(family: str, options: SamplingOptions | None = None) -> SampleBatch:
        options = options or sampling()
        if (family, options) not in made:
            engine = rollout(checkpoint(family))
            made[family, options] = engine.generate(requests(), options, min_version=0)
            engine.close()
        return made[family, options]

    return batch


@pytest.fixture
def engines() -> Iterator[list[Any]]:
    opened: list[Any] = []
    yield opened
    for engine in opened:
        engine.close()


@settings(max_examples=14, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(["qwen3", "qwen3_moe_mixed"]),
    steps=st.integers(1, 5),
    page_tokens=st.sampled_from([1, 4, 16]),
    max_running=st.sampled_from([1, 3, 12]),
    pages=st.sampled_from([36, 240]),
    prefill=st.sampled_from([5, 2048]),
    greedy=st.booleans(),
    sharing=st.booleans(),
)
def test_a_draft_changes_no_bit_of_what_is_sampled(
    checkpoint, plain, family, steps, page_tokens, max_running, pages, prefill, greedy, sharing
):
    options = sampling(temperature=0.0 if greedy else 0.7)
    engine = rollout(
        checkpoint(family),
        draft_steps=steps,
        page_tokens=page_tokens,
        max_running=max_running,
        kv_pool_tokens=pages * page_tokens,
        prefill_chunk_tokens=prefill,
        prefix_sharing=sharing,
    )
    try:
        assert_same(engine.generate(requests(), options, min_version=0), plain(family, options))
        health = engine.health()
    finally:
        engine.close()
    assert health["free_pages"] == health["pages"]
    assert health["right_guesses"] <= health["guesses"] <= steps * health["verifications"]
    assert health["verifications"] <= health["verified_tokens"] <= (steps + 1) * health["verifications"]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe_mixed"])
def test_what_the_rollout_guesses_is_what_the_trainers_draft_says_at_that_position(
    checkpoint, plain, engines, tmp_path, family, monkeypatch
):
    greedy = sampling(temperature=0.0, stop_token_ids=())
    engines.append(server := rollout(checkpoint(family), draft_steps=1, seed=3, page_tokens=4, kv_pool_tokens=160))
    guesses: dict[tuple[int, int], int] = {}
    propose = server._draft.propose

    def noted(samples, counts, choose):
        found = propose(samples, counts, choose)
        guesses.update({(s.index, len(s.tokens)): tokens[0] for s, tokens in zip(samples, found, strict=True) if tokens})
        return found

    monkeypatch.setattr(server._draft, "propose", noted)
    batch = server.generate(requests(), greedy, min_version=0)
    assert_same(batch, plain(family, greedy))
    assert server.num_retracted > 0
    engines.append(learner := trainer(checkpoint(family), tmp_path))
    said = likeliest_by_position(learner, batch)
    assert len(guesses) > 30
    assert guesses == {place: said[place] for place in guesses}


def likeliest_by_position(learner: TorchTrainEngine, batch: SampleBatch) -> dict[tuple[int, int], int]:
    """By sample and position, the draft's likeliest token there, from the trainer's packed forward."""
    found = {}
    policy, prepared = learner._policy, PreparedWeights()
    for part in learner._pack(batch, learner.config, batch.routing is not None):
        with torch.no_grad():
            states = learner._run_stage(policy, part, None, _RoutingCount())
            hidden = learner._draft.forward(policy.decoder, policy.weights, prepared, part, states)
        tokens = iter(policy.decoder.likeliest(policy.weights, prepared, hidden).tolist())
        for sample, length in zip(part.samples.tolist(), part.sequences.lengths, strict=True):
            found.update({(sample, position + 1): next(tokens) for position in range(length)})
    return found


def test_tensor_parallel_ranks_draft_alike(checkpoint, plain, run_ranks):
    def run(rank: int, rendezvous: str) -> tuple[SampleBatch, int]:
        engine = rollout(checkpoint("qwen3_moe_mixed"), rank, rendezvous, layout=RolloutLayout(tp=2), draft_steps=2)
        batch = engine.generate(requests(), sampling(), min_version=0)
        found = batch, engine.num_verified_tokens
        engine.close()
        return found

    (first, tokens), (second, others) = run_ranks(2, run)
    assert_same(first, second)
    assert_same(first, plain("qwen3_moe_mixed"))
    assert tokens == others > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_draft_learns_and_the_policy_does_not_change(checkpoint, plain, engines, tmp_path, family):
    batch = plain(family)
    engines.append(engine := trainer(checkpoint(family), tmp_path, micro_batch_tokens=60))
    before = engine.weights_sha256()
    metrics = [dict(engine.draft_step(batch, optimizer=ADAM)) for _ in range(25)]
    assert engine.weights_sha256() == before
    assert all(parameter.grad is None for parameter in engine._policy.weights.values())
    assert all(not buffer.gradients.any() for buffer in engine._buffers)
    assert metrics[0]["draft_tokens"] == int(np.maximum(batch.response_length - 1, 0).sum())
    assert metrics[0]["draft_grad_norm"] > 0
    assert metrics[-1]["draft_loss"] < 0.5 * metrics[0]["draft_loss"]
    assert metrics[-1]["draft_accuracy"] > metrics[0]["draft_accuracy"]


def test_what_the_trainer_learnt_speeds_up_the_rollout(checkpoint, plain, engines, tmp_path):
    batch = plain("qwen3_moe_mixed")
    engines.append(learner := trainer(checkpoint("qwen3_moe_mixed"), tmp_path))
    engines.append(server := rollout(checkpoint("qwen3_moe_mixed"), draft_steps=2, seed=3))

    def tokens_per_verification(version: int) -> float:
        give(learner, server, version)
        verifications, tokens = server.num_verifications, server.num_verified_tokens
        found = server.generate(requests(), sampling(), min_version=version)
        np.testing.assert_array_equal(found.tokens, batch.tokens)
        np.testing.assert_array_equal(found.rollout_log_probs, batch.rollout_log_probs)
        return (server.num_verified_tokens - tokens) / (server.num_verifications - verifications)

    def right() -> int:
        return server.num_right_guesses

    untrained, guessed = tokens_per_verification(1), right()
    for _ in range(40):
        learner.draft_step(batch, optimizer=ADAM)
    assert tokens_per_verification(2) > untrained + 0.5
    assert right() - guessed > guessed


def give(learner: TorchTrainEngine, server: RolloutEngine, version: int) -> None:
    for bucket in learner.export_weights(version, bucket_bytes=20_000):
        server.update_weights(bucket)
    server.commit_weights(version)
    learner.release_weights(version)


def test_both_engines_begin_with_the_same_draft_and_a_sync_brings_the_trainers(checkpoint, plain, engines, tmp_path):
    engines.append(learner := trainer(checkpoint("qwen3"), tmp_path))
    engines.append(server := rollout(checkpoint("qwen3"), draft_steps=2, seed=3))

    def equal() -> bool:
        ours = learner._draft.exported()
        return all(torch.equal(ours[f"draft.{name}"], tensor) for name, tensor in server._draft.weights.items())

    assert equal()
    learner.draft_step(plain("qwen3"), optimizer=ADAM)
    assert not equal()
    server.sleep(["weights", "kv_cache"])
    server.wake(["weights", "kv_cache"])
    give(learner, server, 1)
    assert equal()
    np.testing.assert_array_equal(server.generate(requests(), sampling(), min_version=1).tokens, plain("qwen3").tokens)


def test_a_version_without_the_draft_is_not_served(checkpoint, engines, tmp_path):
    engines.append(learner := trainer(checkpoint("qwen3"), tmp_path, draft=False))
    engines.append(server := rollout(checkpoint("qwen3"), draft_steps=2))
    with pytest.raises(EngineError, match=r"such as 'draft\."):
        give(learner, server, 1)


def test_training_goes_on_bit_for_bit_after_a_checkpoint(checkpoint, plain, engines, tmp_path):
    batch = plain("qwen3")
    engines.append(first := trainer(checkpoint("qwen3"), tmp_path / "a"))
    engines.append(second := trainer(checkpoint("qwen3"), tmp_path / "b", seed=4))
    first.draft_step(batch, optimizer=ADAM)
    first.save(tmp_path / "saved")
    second.load(tmp_path / "saved")
    for engine in (first, second):
        engine.offload(["weights", "gradients", "optimizer"])
        engine.onload(["weights", "gradients", "optimizer"])
    assert dict(first.draft_step(batch, optimizer=ADAM)) == dict(second.draft_step(batch, optimizer=ADAM))
    theirs = second._draft.exported()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in first._draft.exported().items())


@pytest.mark.parametrize("layout", [TrainLayout(tp=2, etp=2), TrainLayout(dp=2, ep=2, etp=1)], ids=["tp2", "dp2_ep2"])
def test_ranks_share_the_work_of_a_draft_step(checkpoint, plain, run_ranks, engines, tmp_path, layout):
    batch = plain("qwen3_moe_mixed")
    engines.append(alone := trainer(checkpoint("qwen3_moe_mixed"), tmp_path / "alone"))
    expected = [dict(alone.draft_step(batch, optimizer=ADAM)) for _ in range(2)]

    def run(rank: int, rendezvous: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        engine = trainer(checkpoint("qwen3_moe_mixed"), tmp_path / f"rank{rank}", rank, rendezvous, layout=layout)
        found = [dict(engine.draft_step(batch, optimizer=ADAM)) for _ in range(2)]
        weights = {name: tensor.clone() for name, tensor in engine._draft.exported().items()}
        engine.close()
        return found, weights

    ranks = run_ranks(2, run)
    for found, weights in ranks:
        for step, alike in zip(found, expected, strict=True):
            assert step == pytest.approx(alike, rel=1e-3)
        assert all(torch.equal(tensor, ranks[0][1][name]) for name, tensor in weights.items())


def test_a_policy_step_is_the_same_with_a_draft_beside_it(checkpoint, plain, engines, tmp_path):
    digests = []
    for draft in (False, True):
        engines.append(engine := trainer(checkpoint("qwen3_moe_mixed"), tmp_path / str(draft), draft=draft))
        for _ in range(2):
            engine.train_step(
                plain("qwen3_moe_mixed"), loss=LossOptions(kind="sft"), optimizer=ADAM, replay_routing=True, temperature=0.7
            )
            if draft:
                engine.draft_step(plain("qwen3_moe_mixed"), optimizer=ADAM)
        digests.append(engine.weights_sha256())
    assert digests[0] == digests[1]


def test_samples_of_one_token_teach_a_draft_nothing(checkpoint, plain, engines, tmp_path):
    engines.append(server := rollout(checkpoint("qwen3"), draft_steps=2))
    short = server.generate(requests(), sampling(max_response_tokens=1), min_version=0)
    engines.append(engine := trainer(checkpoint("qwen3"), tmp_path))
    metrics = engine.draft_step(short, optimizer=ADAM)
    assert metrics["draft_skipped_steps"] == 1.0
    assert metrics["draft_tokens"] == 0.0
    assert server.num_verifications == 0


def test_a_trainer_without_a_draft_says_so(checkpoint, plain, engines, tmp_path):
    engines.append(engine := trainer(checkpoint("qwen3"), tmp_path, draft=False))
    with pytest.raises(EngineError, match="no draft"):
        engine.draft_step(plain("qwen3"), optimizer=ADAM)


@pytest.mark.parametrize(
    ("proposed", "drawn", "standing"),
    [([], [7], 1), ([7], [7, 8], 2), ([7], [6, 8], 1), ([7, 8, 9], [7, 1, 9, 4], 2), ([7, 8], [7, 8, 9], 3)],
)
def test_tokens_stand_up_to_the_first_wrong_guess_and_one_beyond(proposed, drawn, standing):
    assert accepted(proposed, drawn) == standing
