from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles_plan.backends.engine import EngineError, Request, TrainEngine
from miles_plan.backends.torch_engine.options import RolloutEngineOptions, TrainEngineOptions
from miles_plan.backends.torch_engine.rollout_engine import TorchRolloutEngine
from miles_plan.backends.torch_engine.train_engine import TorchTrainEngine
from miles_plan.backends.training import shard_files
from miles_plan.data.batch import Array, SampleBatch, ragged_rows
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.options import LossOptions, OptimizerOptions, SamplingOptions

TEMPERATURE = 0.7
SFT = LossOptions(kind="sft")
POLICY = LossOptions(kind="policy_gradient", kl_coef=0.1, entropy_coef=0.01)
ADAM = OptimizerOptions(learning_rate=0.003, weight_decay=0.1, clip_grad_norm=1.0)


def sampling(temperature: float = TEMPERATURE) -> SamplingOptions:
    return SamplingOptions(max_response_tokens=12, temperature=temperature, stop_token_ids=(2, 3, 4), seed=5)


def requests() -> list[Request]:
    draw = np.random.default_rng(0)
    prompts = [tuple(draw.integers(5, 41, size=draw.integers(1, 9)).tolist()) for _ in range(6)]
    return [Request(sample_id=100 + i, prompt_id=i // 4, prompt=prompts[i // 4]) for i in range(24)]


def roll_out(directory: Path, temperature: float, dtype: str, tp: int = 1, rank: int = 0, rendezvous: str | None = None) -> Any:
    options = RolloutEngineOptions(
        model_directory=directory,
        layout=RolloutLayout(tp=tp),
        dtype=dtype,
        kv_pool_tokens=1024,
        max_running=7,
        return_routing="moe" in directory.name,
    )
    engine = TorchRolloutEngine(options, rank=rank, rendezvous=rendezvous)
    batch = engine.generate(requests(), sampling(temperature), min_version=0)
    engine.close()
    return batch


def trainer(directory: Path, host: Path, rank: int = 0, rendezvous: str | None = None, **options: Any) -> TorchTrainEngine:
    return TorchTrainEngine(
        TrainEngineOptions(model_directory=directory, host_directory=host, **options), rank=rank, rendezvous=rendezvous
    )


@pytest.fixture(scope="module")
def sampled(checkpoint: Callable[[str], Path]) -> Callable[..., SampleBatch]:
    """What the rollout engine samples from a family's checkpoint; made once for each set of arguments."""
    made: dict[tuple[Any, ...], SampleBatch] = {}

    def make(family: str, temperature: float = TEMPERATURE, dtype: str = "float32") -> SampleBatch:
        key = (family, temperature, dtype)
        if key not in made:
            made[key] = roll_out(checkpoint(family), temperature, dtype)
        return made[key]

    return make


@pytest.fixture
def engine_of(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., TorchTrainEngine]]:
    opened: list[TorchTrainEngine] = []

    def make(family: str, **options: Any) -> TorchTrainEngine:
        opened.append(trainer(checkpoint(family), tmp_path / f"host{len(opened)}", **options))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


def log_probs_of(
    engine: TorchTrainEngine, batch: SampleBatch, model: Any = "policy", temperature: float = TEMPERATURE
) -> Array:
    """Flat over the batch's response tokens, from one rank that holds everything; NaN where none came."""
    replay = batch.routing is not None and model == "policy"
    found = engine.log_probs(batch, model=model, temperature=temperature, replay_routing=replay)
    return in_batch_order(batch, [found])


def in_batch_order(batch: SampleBatch, by_rank: list[Any]) -> Array:
    flat = np.full(len(batch.rollout_log_probs), np.nan, dtype=np.float32)
    for found in by_rank:
        rows = ragged_rows(batch.response_start[found.sample_index], batch.response_length[found.sample_index])
        flat[rows] = found.log_probs
    return flat


def with_targets(batch: SampleBatch) -> SampleBatch:
    """Advantages, and old and reference log-probs near those of the rollout, as a second update of a step would see them."""
    draw = np.random.default_rng(1)
    count = len(batch.rollout_log_probs)
    return batch.with_columns(
        advantage=np.repeat(draw.normal(size=batch.num_samples), batch.response_length).astype(np.float32),
        old_log_probs=(batch.rollout_log_probs + 0.1 * draw.normal(size=count)).astype(np.float32),
        reference_log_probs=(batch.rollout_log_probs + 0.1 * draw.normal(size=count)).astype(np.float32),
    )


def step(engine: TorchTrainEngine, batch: SampleBatch, loss: LossOptions = POLICY, **optimizer: Any) -> dict[str, float]:
    return dict(
        engine.train_step(
            batch,
            loss=loss,
            optimizer=replace(ADAM, **optimizer),
            replay_routing=batch.routing is not None,
            temperature=TEMPERATURE,
        )
    )


def test_it_is_a_train_engine(engine_of):
    assert isinstance(engine_of("qwen3"), TrainEngine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe_mixed", "llama"])
def test_log_probs_are_the_rollouts_bits_in_any_batch(engine_of, sampled, family, temperature, dtype):
    batch = sampled(family, temperature, dtype)
    assert len(set(batch.length.tolist())) > 2
    orders = [np.arange(24), np.random.default_rng(3).permutation(24)[:11]]
    for micro_batch_tokens, order in ((8192, orders[0]), (20, orders[0]), (50, orders[1])):
        engine = engine_of(family, dtype=dtype, micro_batch_tokens=micro_batch_tokens)
        part = batch.select(order)
        assert np.abs(log_probs_of(engine, part, temperature=temperature) - part.rollout_log_probs).max() == 0.0


def test_replayed_experts_are_compared_with_the_routers_choice(engine_of, sampled):
    batch = sampled("qwen3_moe")
    engine = engine_of("qwen3_moe")
    found = engine.log_probs(batch, model="policy", temperature=TEMPERATURE, replay_routing=True)
    fed = int((batch.length - 1).sum())
    assert (found.routing_mismatches, found.routing_compared) == (0, 2 * fed)
    other = batch.routing.copy()
    predicting = int(batch.start[3] + batch.prompt_length[3]) - 1
    other[predicting, 1] = (other[predicting, 1] + 1) % 8
    changed = replace(batch, routing=other)
    found = engine.log_probs(changed, model="policy", temperature=TEMPERATURE, replay_routing=True)
    assert found.routing_mismatches == 1
    differs = in_batch_order(changed, [found]) != batch.rollout_log_probs
    assert differs.nonzero()[0].tolist() == [int(batch.response_start[3])]


def test_training_steps_equal_transformers_with_adamw(checkpoint, engine_of, sampled, tmp_path):
    from transformers import AutoModelForCausalLM

    batch, engine = sampled("qwen3_moe"), engine_of("qwen3_moe")
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"), dtype=torch.float32)
    decayed = [each for each in theirs.parameters() if each.ndim > 1]
    plain = [each for each in theirs.parameters() if each.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.003, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(3):
        total = 0.0
        for index in range(batch.num_samples):
            tokens = torch.tensor(batch.sequence(index).astype(np.int64))
            scores = torch.log_softmax(theirs(tokens[None, :-1]).logits[0] / TEMPERATURE, dim=-1)
            answers = scores.gather(1, tokens[1:, None])[int(batch.prompt_length[index]) - 1 :]
            total = total - answers.sum() / len(batch.rollout_log_probs)
        adam.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adam.step()
        metrics = dict(engine.train_step(batch, loss=SFT, optimizer=ADAM, replay_routing=False, temperature=TEMPERATURE))
        assert metrics["loss"] == pytest.approx(total.item(), rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    engine.export_checkpoint(tmp_path / "trained")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    for name, tensor in theirs.state_dict().items():
        difference = (ours[name] - tensor).abs()  # Adam's first steps have size lr whatever the gradient's: compare in the mean
        assert difference.mean() < 2e-5, name


@pytest.mark.parametrize("options", [{"micro_batch_tokens": 40}, {"recompute": "full"}, {"recompute": "selective"}])
def test_micro_batches_and_recompute_change_nothing_but_rounding(engine_of, sampled, options):
    batch = with_targets(sampled("qwen3_moe"))
    plain, other = engine_of("qwen3_moe"), engine_of("qwen3_moe", **options)
    for _ in range(2):
        expected, found = step(plain, batch), step(other, batch)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    if "recompute" in options:
        assert other.weights_sha256() == plain.weights_sha256()


def test_the_same_calls_give_the_same_bits_and_other_calls_do_not(engine_of, sampled):
    batch = with_targets(sampled("qwen3_moe"))
    first, second = engine_of("qwen3_moe"), engine_of("qwen3_moe")
    assert first.weights_sha256() == second.weights_sha256()
    assert step(first, batch) == step(second, batch)
    assert first.weights_sha256() == second.weights_sha256()
    step(second, batch)
    assert first.weights_sha256() != second.weights_sha256()


def test_on_policy_ratio_is_exactly_one(engine_of, sampled):
    batch = with_targets(sampled("qwen3_moe"))
    batch = batch.with_columns(old_log_probs=batch.rollout_log_probs)
    metrics = step(engine_of("qwen3_moe"), batch)
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-7)
    assert metrics["old_policy_kl"] == 0.0
    assert metrics["clip_fraction"] == 0.0
    assert metrics["routing_mismatches"] == 0.0


def test_training_raises_the_probability_of_rewarded_tokens(engine_of, sampled):
    batch = with_targets(sampled("qwen3"))
    batch = batch.with_columns(old_log_probs=batch.rollout_log_probs)
    engine = engine_of("qwen3")
    step(engine, batch, replace(POLICY, kl_coef=0.0, entropy_coef=0.0), learning_rate=1e-3)
    gain = (log_probs_of(engine, batch) - batch.rollout_log_probs) * batch.columns["advantage"]
    assert gain.mean() > 0.01


def test_gradients_that_are_not_finite_skip_the_step(engine_of, sampled):
    batch = with_targets(sampled("qwen3"))
    engine = engine_of("qwen3")
    before = engine.weights_sha256()
    broken = batch.columns["advantage"].copy()
    broken[3] = np.nan
    metrics = step(engine, batch.with_columns(advantage=broken))
    assert metrics["skipped_steps"] == 1.0
    assert math.isnan(metrics["grad_norm"])
    assert engine.weights_sha256() == before
    fresh = engine_of("qwen3")
    assert step(engine, batch) == step(fresh, batch)


def test_a_batch_without_a_counted_token_skips_the_step(engine_of, sampled):
    batch = with_targets(sampled("qwen3"))
    engine = engine_of("qwen3")
    before = engine.weights_sha256()
    nothing = batch.with_columns(loss_mask=np.zeros(len(batch.rollout_log_probs)))
    metrics = step(engine, nothing)
    assert (metrics["tokens"], metrics["loss"], metrics["skipped_steps"]) == (0.0, 0.0, 1.0)
    assert engine.weights_sha256() == before


def test_reference_stays_until_a_snapshot_is_taken(engine_of, sampled):
    batch = with_targets(sampled("qwen3_moe"))
    engine = engine_of("qwen3_moe", keep_reference=True)
    initial = log_probs_of(engine, batch, "reference")
    step(engine, batch)
    assert (log_probs_of(engine, batch, "reference") == initial).all()
    engine.snapshot_reference()
    unreplayed = replace(batch, routing=None)
    assert (log_probs_of(engine, unreplayed, "reference") == log_probs_of(engine, unreplayed)).all()
    assert (log_probs_of(engine, batch, "reference") != initial).any()


def test_teacher_scores_with_its_own_weights(checkpoint, engine_of, sampled):
    batch = sampled("qwen3")
    engine = engine_of("qwen3", teacher_directory=checkpoint("llama"))
    teacher = engine_of("llama")
    assert (log_probs_of(engine, batch, "teacher") == log_probs_of(teacher, batch)).all()


def test_what_the_batch_or_engine_lacks_is_named(engine_of, sampled):
    batch = sampled("qwen3")
    engine = engine_of("qwen3")
    with pytest.raises(EngineError, match=r"lacks the columns \['advantage', 'old_log_probs', 'reference_log_probs'\]"):
        step(engine, batch)
    with pytest.raises(EngineError, match="holds no reference model; set keep_reference"):
        log_probs_of(engine, batch, "reference")
    with pytest.raises(EngineError, match="routing replay for a model without experts"):
        engine.log_probs(batch, model="policy", temperature=1.0, replay_routing=True)
    with pytest.raises(EngineError, match=r"token ids 5\.\.99 are outside the vocabulary of 41"):
        log_probs_of(engine, replace(batch, tokens=np.where(batch.tokens < 5, 5, 99).astype(np.int32)))
    mixture = sampled("qwen3_moe")
    with pytest.raises(EngineError, match=r"\[1, 2\] layers and slots, the model \[2, 2\]"):
        log_probs_of(engine_of("qwen3_moe"), replace(mixture, routing=mixture.routing[:, :1]))


def test_offloading_frees_memory_and_brings_back_every_bit(engine_of, sampled):
    batch = with_targets(sampled("qwen3_moe"))
    engine, resident = (engine_of("qwen3_moe", keep_reference=True) for _ in range(2))
    for each in (engine, resident):
        step(each, batch)
    before = engine.memory()
    assert all(before.device_bytes[part] > 0 for part in ("weights", "gradients", "optimizer", "reference"))
    assert sum(before.host_bytes.values()) == 0
    after = engine.offload(["weights", "gradients", "optimizer", "reference"])
    assert sum(after.device_bytes.values()) == 0
    assert after.host_bytes.keys() == {"weights", "optimizer", "reference"}
    for call in (lambda: step(engine, batch), lambda: log_probs_of(engine, batch), engine.weights_sha256):
        with pytest.raises(EngineError, match="offloaded; onload them first"):
            call()
    engine.onload(["weights"])
    assert engine.weights_sha256() == resident.weights_sha256()
    with pytest.raises(EngineError, match="its gradients are offloaded"):
        step(engine, batch)
    engine.onload(["gradients", "optimizer", "reference"])
    assert sum(engine.memory().host_bytes.values()) == 0
    assert step(engine, batch) == step(resident, batch)
    assert engine.weights_sha256() == resident.weights_sha256()
    with pytest.raises(ValueError, match="not 'kv_cache'"):
        engine.offload(["kv_cache"])


def test_everything_that_touches_weights_leaves_them_offloadable(engine_of, sampled, tmp_path):
    engine = engine_of("qwen3_moe", keep_reference=True)
    engine.weights_sha256()
    engine.save(tmp_path / "state")
    engine.export_checkpoint(tmp_path / "model")
    list(engine.export_weights(1, bucket_bytes=1 << 20))
    engine.release_weights(1)
    engine.offload(["weights", "optimizer", "reference"])
    engine.onload(["weights", "optimizer", "reference"])


def resume(rank: int, rendezvous: str, directory: Path, host: Path, state: Path, batch: SampleBatch) -> tuple[str, Array]:
    """What a fresh process computes after loading: the weights two steps later, and the reference's log-probs."""
    engine = trainer(directory, host, keep_reference=True, dtype="bfloat16")
    engine.load(state)
    for _ in range(2):
        step(engine, batch)
    found = engine.weights_sha256(), log_probs_of(engine, batch, "reference")
    engine.close()
    return found


def test_a_fresh_process_resumes_bit_for_bit(checkpoint, engine_of, sampled, ranks, tmp_path):
    batch = with_targets(sampled("qwen3_moe", dtype="bfloat16"))
    engine = engine_of("qwen3_moe", keep_reference=True, dtype="bfloat16")
    step(engine, batch)
    engine.snapshot_reference()
    step(engine, batch)
    assert list(engine.save(tmp_path / "state")) == ["rank_00000.safetensors"]
    for _ in range(2):
        step(engine, batch)
    [(weights, reference)] = ranks.run(resume, 1, checkpoint("qwen3_moe"), tmp_path / "host", tmp_path / "state", batch)
    assert weights == engine.weights_sha256()
    assert (reference == log_probs_of(engine, batch, "reference")).all()


def test_a_checkpoint_of_another_engine_is_refused(engine_of, tmp_path):
    engine_of("qwen3").save(tmp_path)
    with pytest.raises(EngineError, match=r"rank_00000\.safetensors was written with dtype 'float32', this engine has 'bf"):
        engine_of("qwen3", dtype="bfloat16").load(tmp_path)
    with pytest.raises(EngineError, match="was written with model"):
        engine_of("llama").load(tmp_path)
    with pytest.raises(EngineError, match=r"'buffer0\.reference' is only on one side"):
        engine_of("qwen3", keep_reference=True).load(tmp_path)


def test_exported_weights_reach_the_rollout_engine(checkpoint, engine_of, sampled):
    batch = with_targets(sampled("qwen3_moe"))
    engine = engine_of("qwen3_moe")
    step(engine, batch)
    rollout = TorchRolloutEngine(
        RolloutEngineOptions(model_directory=checkpoint("qwen3_moe"), kv_pool_tokens=1024, return_routing=True)
    )
    buckets = list(engine.export_weights(7, bucket_bytes=20_000))
    assert [bucket.index for bucket in buckets] == list(range(len(buckets)))
    assert [bucket.last for bucket in buckets] == [False] * (len(buckets) - 1) + [True]
    for bucket in buckets:
        rollout.update_weights(bucket)
    assert rollout.commit_weights(7) == 7
    engine.release_weights(7)
    assert not any(Path(bucket.handle).exists() for bucket in buckets)
    fresh = rollout.generate(requests(), sampling(), min_version=7)
    rollout.close()
    assert (log_probs_of(engine, fresh) == fresh.rollout_log_probs).all()
    assert (fresh.weight_version == 7).all()


# Layouts: everything below runs on real ranks, one function a layout, so that processes and groups are made once.

# With micro-batches of 40 tokens the ranks of an expert group would choose different numbers of them in the last of these.
LAYOUTS = [
    ("qwen3", TrainLayout(dp=2)),
    ("qwen3", TrainLayout(tp=2)),
    ("qwen3", TrainLayout(pp=2)),
    ("llama_biased_llama3_rope", TrainLayout(tp=2, dp=2)),
    ("qwen3", TrainLayout(pp=2, dp=2)),
    ("qwen3_moe", TrainLayout(tp=2, etp=2)),
    ("qwen3_moe", TrainLayout(dp=2, ep=2)),
    ("qwen3_moe_mixed", TrainLayout(pp=2, dp=2, ep=2)),
    ("qwen3_moe", TrainLayout(tp=2, etp=2, dp=2, ep=2)),
    ("qwen3_moe", TrainLayout(dp=4, ep=2)),
]


def exercise(
    rank: int, rendezvous: str | None, directory: Path, root: Path, layout: TrainLayout, batch: SampleBatch
) -> dict[str, Any]:
    """Score, train two steps, export, save, train, load, train again; all that the test compares."""
    engine = trainer(directory, root / "host", rank, rendezvous, layout=layout, keep_reference=True, micro_batch_tokens=40)
    replay = batch.routing is not None
    found: dict[str, Any] = {"initial_sha256": engine.weights_sha256()}
    found["log_probs"] = engine.log_probs(batch, model="policy", temperature=TEMPERATURE, replay_routing=replay)
    found["metrics"] = [step(engine, batch) for _ in range(2)]
    found["trained_sha256"] = engine.weights_sha256()
    found["replicated"] = {
        name: tensor.tolist() for name, tensor in engine._policy.weights.items() if "norm" in name or ".gate." in name
    }
    found["buckets"] = [
        (bucket.index, bucket.last, {tensor.name: tensor.checksum for tensor in bucket.tensors})
        for bucket in engine.export_weights(3, bucket_bytes=50_000)
    ]
    engine.release_weights(3)
    found["files"] = engine.export_checkpoint(root / "model")
    engine.save(root / "state")
    engine.offload(["weights", "gradients", "optimizer", "reference"])
    engine.onload(["weights", "gradients", "optimizer", "reference"])
    step(engine, batch)
    found["later_sha256"] = engine.weights_sha256()
    engine.load(root / "state")
    step(engine, batch)
    found["resumed_sha256"] = engine.weights_sha256()
    found["trained_log_probs"] = engine.log_probs(batch, model="policy", temperature=TEMPERATURE, replay_routing=replay)
    engine.close()
    return found


def of_all(found: list[dict[str, Any]], name: str) -> Any:
    """What all ranks must agree on."""
    assert all(each[name] == found[0][name] for each in found), name
    return found[0][name]


@pytest.mark.parametrize(("family", "layout"), LAYOUTS, ids=lambda value: str(value).replace(" ", ""))
def test_layouts_score_the_same_bits_and_train_alike(checkpoint, sampled, ranks, tmp_path, family, layout):
    from safetensors.torch import load_file

    directory, batch = checkpoint(family), with_targets(sampled(family))
    single = exercise(0, None, directory, tmp_path / "one", TrainLayout(), batch)
    found = ranks.run(exercise, layout.world_size, directory, tmp_path / "many", layout, batch)

    assert of_all(found, "initial_sha256") == single["initial_sha256"]
    assert (in_batch_order(batch, [each["log_probs"] for each in found]) == batch.rollout_log_probs).all()
    compared = [sum(each["log_probs"].routing_compared for each in group) for group in (found, [single])]
    assert compared[0] == compared[1]
    assert sum(each["log_probs"].routing_mismatches for each in found) == 0

    for ours, theirs in zip(of_all(found, "metrics"), single["metrics"], strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
    ours, theirs = (load_file(tmp_path / which / "model" / "model.safetensors") for which in ("many", "one"))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().mean() < 2e-5, name
    of_all(found, "trained_sha256")
    for each in found:
        for name, values in each["replicated"].items():
            assert all(values == other["replicated"].get(name, values) for other in found), name
    assert of_all(found, "resumed_sha256") == of_all(found, "later_sha256")

    assert [each["files"] for each in found][1:] == [[]] * (layout.world_size - 1)
    buckets = sorted(bucket for each in found for bucket in each["buckets"])
    assert [bucket[:2] for bucket in buckets] == [(index, index == len(buckets) - 1) for index in range(len(buckets))]
    names = [name for _, _, tensors in buckets for name in tensors]
    assert sorted(names) == sorted(theirs)


def fail_on_one_rank(rank: int, rendezvous: str, directory: Path, root: Path) -> tuple[list[str], str]:
    """What each rank says when one of them cannot load or write; and that all of them still work afterwards."""
    engine = trainer(directory, root / "host", rank, rendezvous, layout=TrainLayout(pp=2))
    engine.save(root / "state")
    if rank == 1:
        (root / "state" / "rank_00001.safetensors").write_bytes(b"broken")
    said = []
    for attempt in (
        lambda: engine.load(root / "state"),
        lambda: engine.export_checkpoint(root),
        lambda: engine.export_checkpoint(root / "full"),
    ):
        refuses_writes = rank == 0 and len(said) == 2
        with pytest.MonkeyPatch.context() as patch:
            if refuses_writes:
                patch.setattr(shard_files, "save_file", no_space_left)
            try:
                attempt()
                said.append("done")
            except EngineError as error:
                said.append(str(error))
    sha256 = engine.weights_sha256()
    engine.close()
    return said, sha256


def no_space_left(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_no_rank_waits_for_one_that_failed(checkpoint, ranks, tmp_path):
    (first, first_sha256), (second, second_sha256) = ranks.run(fail_on_one_rank, 2, checkpoint("qwen3"), tmp_path)
    assert "loading" in first[0]
    assert "failed on 1 other ranks" in first[0]
    assert "cannot read" in second[0]
    assert "rank_00001.safetensors" in second[0]
    assert "exists already" in first[1]
    assert "failed on 1 other ranks" in second[1]
    assert "No space left" in first[2]
    assert second[2] == "done"
    assert first_sha256 == second_sha256
    assert sorted(each.name for each in tmp_path.iterdir()) == ["state"]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_rollout_and_trainer_may_differ_in_tensor_parallel_size(checkpoint, engine_of, ranks, sampled, family):
    batches = ranks.run(roll_out_on, 2, checkpoint(family))
    batch = batches[0]
    assert (batch.rollout_log_probs == batches[1].rollout_log_probs).all()
    assert (batch.rollout_log_probs == sampled(family).rollout_log_probs).all()
    assert (log_probs_of(engine_of(family), batch) == batch.rollout_log_probs).all()


def roll_out_on(rank: int, rendezvous: str, directory: Path) -> SampleBatch:
    return roll_out(directory, TEMPERATURE, "float32", tp=2, rank=rank, rendezvous=rendezvous)
