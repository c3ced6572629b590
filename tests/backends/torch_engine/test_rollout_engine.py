from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles_plan.backends.engine import EngineError, Request, RolloutEngine
from miles_plan.backends.torch_engine.decoder import Decoder
from miles_plan.backends.torch_engine.mesh import open_mesh
from miles_plan.backends.torch_engine.options import RolloutEngineOptions
from miles_plan.backends.torch_engine.prepared import PreparedWeights
from miles_plan.backends.torch_engine.rollout_engine import TorchRolloutEngine
from miles_plan.backends.torch_engine.weights import (
    full_names,
    gather_full_tensors,
    initialise_checkpoint,
    load_weights,
    shard_of_rank,
)
from miles_plan.backends.training.decoder_config import read_config
from miles_plan.backends.weight_transport.shared_memory import SharedMemoryWriter, plan_buckets
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.options import SamplingOptions
from miles_plan.kernels.attention import pack_sequences

STOP = (2, 5, 11)
SAMPLING = SamplingOptions(max_response_tokens=24, temperature=0.8, stop_token_ids=STOP, seed=5)
FAMILIES = ["llama", "qwen3_moe_mixed"]


def requests(prompts: int = 5, samples: int = 3) -> list[Request]:
    random = np.random.default_rng(0)
    texts = [tuple(random.integers(3, 41, size=random.integers(1, 30)).tolist()) for _ in range(prompts)]
    return [
        Request(sample_id=10 * prompt + sample, prompt_id=prompt, prompt=text)
        for prompt, text in enumerate(texts)
        for sample in range(samples)
    ]


def engine(directory: Path, **options: Any) -> TorchRolloutEngine:
    defaults: dict[str, Any] = {"kv_pool_tokens": 4096, "return_routing": bool(read_config(directory).moe_layers)}
    return TorchRolloutEngine(RolloutEngineOptions(model_directory=directory, **{**defaults, **options}))


def generate(directory: Path, sampling: SamplingOptions = SAMPLING, **options: Any) -> SampleBatch:
    running = engine(directory, **options)
    batch = running.generate(requests(), sampling, min_version=0)
    assert running.health()["free_pages"] == running.health()["pages"]
    running.close()
    return batch


def assert_same(first: SampleBatch, second: SampleBatch) -> None:
    for name in (
        "sample_id",
        "prompt_id",
        "tokens",
        "prompt_length",
        "length",
        "stopped",
        "rollout_log_probs",
        "weight_version",
    ):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    assert (first.routing is None) == (second.routing is None)
    if first.routing is not None and second.routing is not None:
        np.testing.assert_array_equal(first.routing, second.routing)


def trainer_log_probs(directory: Path, batch: SampleBatch, temperature: float, dtype: torch.dtype) -> tuple[np.ndarray, int]:
    """Log-probs of the responses by the packed forward with replayed routing, and the routing mismatches."""
    layout = TrainLayout()
    config, mesh = read_config(directory), open_mesh(layout, 0)
    shard = shard_of_rank(mesh, layout, config)
    decoder, weights = Decoder(config, shard, mesh), load_weights(directory, config, shard, dtype=dtype)
    inputs = torch.from_numpy(np.concatenate([batch.sequence(i)[:-1] for i in range(batch.num_samples)])).long()
    targets = torch.from_numpy(np.concatenate([batch.sequence(i)[1:] for i in range(batch.num_samples)])).long()
    lengths = (batch.length - 1).tolist()
    fed = np.concatenate([np.arange(length) + start for length, start in zip(lengths, batch.start, strict=True)])
    replay = None if batch.routing is None else torch.from_numpy(batch.routing[fed].astype(np.int64))
    prepared = PreparedWeights()
    with torch.no_grad():
        output = decoder.forward_packed(
            weights, prepared, decoder.embed(weights, inputs), pack_sequences(lengths), replay=replay
        )
        found, _ = decoder.log_probs(weights, prepared, output.hidden, targets, temperature=temperature)
    responses = np.concatenate(
        [np.arange(length) >= prompt - 1 for length, prompt in zip(lengths, batch.prompt_length, strict=True)]
    )
    return found.numpy()[responses], output.mismatches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_routing_equal_the_trainers_bit_for_bit(
    family: str, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    batch = generate(checkpoint(family), dtype=dtype)
    assert batch.problems() == []
    assert batch.stopped.any()
    assert not batch.stopped.all()
    found, mismatches = trainer_log_probs(checkpoint(family), batch, 0.8, getattr(torch, dtype))
    np.testing.assert_array_equal(found, batch.rollout_log_probs)
    assert mismatches == 0
    assert np.isfinite(batch.rollout_log_probs).all()


@pytest.mark.parametrize(
    "options",
    [
        {"page_tokens": 1},
        {"page_tokens": 64},
        {"max_running": 1},
        {"max_running": 4, "prefill_chunk_tokens": 3},
        {"prefill_chunk_tokens": 7},
        {"prefix_sharing": False},
        {"kv_pool_tokens": 80, "page_tokens": 8},
        {"kv_pool_tokens": 160, "page_tokens": 4, "prefill_chunk_tokens": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_schedule_changes_no_bit(family: str, options: dict[str, Any], checkpoint: Callable[[str], Path]) -> None:
    assert_same(generate(checkpoint(family), **options), generate(checkpoint(family)))


def test_a_small_pool_retracts(checkpoint: Callable[[str], Path]) -> None:
    running = engine(checkpoint("qwen3_moe_mixed"), kv_pool_tokens=160, page_tokens=4)
    running.generate(requests(), SAMPLING, min_version=0)
    assert running.health()["retracted"] > 0


def test_a_request_alone_equals_the_request_in_a_batch(checkpoint: Callable[[str], Path]) -> None:
    running = engine(checkpoint("qwen3_moe_mixed"))
    together = running.generate(requests(), SAMPLING, min_version=0)
    backwards = running.generate(requests()[::-1], SAMPLING, min_version=0)
    assert_same(backwards.select(range(len(requests()) - 1, -1, -1)), together)
    for index in (0, 7, 14):
        assert_same(running.generate([requests()[index]], SAMPLING, min_version=0), together.select([index]))


def test_greedy_follows_transformers(checkpoint: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"), dtype=torch.float32)
    batch = generate(checkpoint("qwen3"), replace(SAMPLING, temperature=0.0))
    for index, request in enumerate(requests()):
        expected = model.generate(
            torch.tensor([request.prompt]), max_new_tokens=24, do_sample=False, eos_token_id=list(STOP), pad_token_id=0
        )
        assert batch.sequence(index).tolist() == expected[0].tolist()
        assert batch.stopped[index] == (expected[0, -1].item() in STOP)


def test_samples_stop_at_stop_tokens_and_at_the_length(checkpoint: Callable[[str], Path]) -> None:
    batch = generate(checkpoint("llama"))
    for index in range(batch.num_samples):
        response = batch.response(index).tolist()
        assert not set(STOP) & set(response[:-1])
        assert batch.stopped[index] == (response[-1] in STOP)
        assert batch.stopped[index] or len(response) == 24


@pytest.mark.parametrize("family", ["llama_biased_llama3_rope", "qwen3_tied", "qwen3_moe_mixed"])
def test_tensor_parallel_ranks_generate_the_bits_of_one(
    family: str, checkpoint: Callable[[str], Path], run_ranks: Callable[[int, Callable[[int, str], Any]], list[Any]]
) -> None:
    directory = checkpoint(family)

    def rank_main(rank: int, rendezvous: str) -> SampleBatch:
        options = RolloutEngineOptions(
            model_directory=directory,
            layout=RolloutLayout(tp=2),
            kv_pool_tokens=512,
            return_routing=family == "qwen3_moe_mixed",
        )
        running = TorchRolloutEngine(options, rank=rank, rendezvous=rendezvous)
        batch = running.generate(requests(), SAMPLING, min_version=0)
        running.close()
        return batch

    expected = generate(directory)
    for batch in run_ranks(2, rank_main):
        assert_same(batch, expected)


def test_tensor_parallel_processes_generate_the_bits_of_one(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = checkpoint("qwen3_moe")
    script = (
        "import os, pickle, sys\n"
        "from miles_plan.backends.torch_engine.rollout_engine import TorchRolloutEngine\n"
        "options, requests, sampling, rank, rendezvous, out = pickle.load(open(sys.argv[1], 'rb'))\n"
        "engine = TorchRolloutEngine(options, rank=rank, rendezvous=rendezvous)\n"
        "with open(out, 'wb') as file:\n"
        "    pickle.dump(engine.generate(requests, sampling, min_version=0), file)\n"
        "engine.close()\n"
        "os._exit(0)\n"  # gloo's threads may still be waiting when Python ends, which would abort the process
    )
    options = RolloutEngineOptions(model_directory=directory, layout=RolloutLayout(tp=2), return_routing=True)
    processes = []
    for rank in range(2):
        job = tmp_path / f"job-{rank}"
        arguments = (options, requests(), SAMPLING, rank, f"file://{tmp_path}/rendezvous", str(tmp_path / f"out-{rank}"))
        job.write_bytes(pickle.dumps(arguments))
        processes.append(subprocess.Popen([sys.executable, "-c", script, str(job)]))
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    expected = generate(directory)
    for rank in range(2):
        assert_same(pickle.loads((tmp_path / f"out-{rank}").read_bytes()), expected)


def send_weights(source: Path, target: TorchRolloutEngine, version: int, *, skip: str = "") -> None:
    """What a trainer of one rank does: full tensors in buckets, one after the other."""
    layout = TrainLayout()
    config, mesh = read_config(source), open_mesh(layout, 0)
    shard = shard_of_rank(mesh, layout, config)
    full = dict(gather_full_tensors(load_weights(source, config, shard, dtype=torch.float32), config, shard, mesh))
    full.pop(skip, None)
    sizes = {name: tensor.numel() * 4 for name, tensor in full.items()}
    writer = SharedMemoryWriter()
    for plan in plan_buckets(sizes, dict.fromkeys(sizes, 0), 50_000):
        target.update_weights(writer.write(version, plan, [(name, full[name]) for name in plan.names]))
    writer.close()


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Path:
    """The mixture-of-experts checkpoint with other weights."""
    path = tmp_path_factory.mktemp("other") / "model"
    config = json.loads((checkpoint("qwen3_moe_mixed") / "config.json").read_text())
    initialise_checkpoint(config, path, seed=1)
    return path


def test_received_weights_serve_as_if_loaded(checkpoint: Callable[[str], Path], other_checkpoint: Path) -> None:
    running = engine(checkpoint("qwen3_moe_mixed"))
    before = running.generate(requests(), SAMPLING, min_version=0)
    send_weights(other_checkpoint, running, version=4)
    with pytest.raises(EngineError, match="weights of version 4 are half received"):
        running.generate(requests(), SAMPLING, min_version=0)
    assert running.commit_weights(4) == 4
    after = running.generate(requests(), SAMPLING, min_version=4)
    assert (after.weight_version == 4).all()
    assert not np.array_equal(before.tokens, after.tokens)
    expected = generate(other_checkpoint)
    assert_same(replace(after, weight_version=expected.weight_version), expected)


def test_missing_tensors_are_named_at_commit(checkpoint: Callable[[str], Path], other_checkpoint: Path) -> None:
    running = engine(checkpoint("qwen3_moe_mixed"))
    send_weights(other_checkpoint, running, version=1, skip="model.norm.weight")
    total = len(full_names(running.config))
    with pytest.raises(EngineError, match=rf"1 of {total} tensors of version 1 did not arrive, such as 'model\.norm\.weight'"):
        running.commit_weights(1)


def test_sleep_frees_memory_and_refuses_until_weights_came(checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint("qwen3_moe_mixed")
    running = engine(directory)
    expected = running.generate(requests(), SAMPLING, min_version=0)
    assert all(held > 0 for held in running.health()["device_bytes"].values())
    report = running.sleep(["weights", "kv_cache"])
    assert dict(report.device_bytes) == {"weights": 0, "kv_cache": 0}
    with pytest.raises(EngineError, match="kv_cache and weights asleep"):
        running.generate(requests(), SAMPLING, min_version=0)
    with pytest.raises(EngineError, match="weights are asleep"):
        send_weights(directory, running, version=1)
    running.wake(["weights"])
    running.wake(["kv_cache", "weights"])
    with pytest.raises(EngineError, match="weights of version 0 or newer are needed, none is held"):
        running.generate(requests(), SAMPLING, min_version=0)
    send_weights(directory, running, version=1)
    running.commit_weights(1)
    again = running.generate(requests(), SAMPLING, min_version=1)
    assert_same(replace(again, weight_version=expected.weight_version), expected)
    with pytest.raises(ValueError, match="not 'optimizer'"):
        running.sleep(["optimizer"])


def test_only_the_cache_sleeps(checkpoint: Callable[[str], Path]) -> None:
    running = engine(checkpoint("llama"))
    expected = running.generate(requests(), SAMPLING, min_version=0)
    assert running.sleep(["kv_cache"]).device_bytes["kv_cache"] == 0
    running.wake(["kv_cache"])
    assert_same(running.generate(requests(), SAMPLING, min_version=0), expected)


@pytest.mark.parametrize(
    ("request_", "sampling", "message"),
    [
        (Request(sample_id=7, prompt_id=0, prompt=()), SAMPLING, "sample 7 has an empty prompt"),
        (Request(sample_id=7, prompt_id=0, prompt=(41,)), SAMPLING, "sample 7 has a token outside the vocabulary of 41"),
        (Request(sample_id=7, prompt_id=0, prompt=(3,) * 250), SAMPLING, "beyond the context of 256"),
        (Request(sample_id=7, prompt_id=0, prompt=(3,) * 60), SAMPLING, "the pool has 4; raise kv_pool_tokens"),
        (Request(sample_id=7, prompt_id=0, prompt=(3,)), replace(SAMPLING, max_response_tokens=0), "at least 1, got 0"),
    ],
)
def test_requests_that_cannot_be_served_are_named(
    request_: Request, sampling: SamplingOptions, message: str, checkpoint: Callable[[str], Path]
) -> None:
    running = engine(checkpoint("llama"), kv_pool_tokens=64)
    with pytest.raises(EngineError, match=message):
        running.generate([request_], sampling, min_version=0)
    assert running.health()["free_pages"] == 4


def test_old_weights_are_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(EngineError, match="weights of version 3 or newer are needed, version 0 is held"):
        engine(checkpoint("llama")).generate(requests(), SAMPLING, min_version=3)


def test_a_model_that_gives_nan_is_named_and_leaves_the_engine_usable(
    checkpoint: Callable[[str], Path], other_checkpoint: Path
) -> None:
    running = engine(checkpoint("qwen3_moe_mixed"))
    running._weights["model.layers.0.input_layernorm.weight"].fill_(float("nan"))
    with pytest.raises(EngineError, match="is not finite; check the weights of version 0"):
        running.generate(requests(), SAMPLING, min_version=0)
    send_weights(other_checkpoint, running, version=1)
    running.commit_weights(1)
    expected = generate(other_checkpoint)
    again = running.generate(requests(), SAMPLING, min_version=1)
    assert_same(replace(again, weight_version=expected.weight_version), expected)


def test_no_requests(checkpoint: Callable[[str], Path]) -> None:
    batch = engine(checkpoint("qwen3_moe_mixed")).generate([], SAMPLING, min_version=0)
    assert batch.num_samples == 0
    assert batch.problems() == []


def test_options_that_cannot_be_are_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="return_routing asks for the experts"):
        engine(checkpoint("llama"), return_routing=True)
    with pytest.raises(ValueError, match="max_context_tokens=300 is beyond the model's 256 positions"):
        engine(checkpoint("llama"), max_context_tokens=300)
    with pytest.raises(ValueError, match="kv_pool_tokens=100 must be a multiple of page_tokens=16"):
        engine(checkpoint("llama"), kv_pool_tokens=100)
    assert isinstance(engine(checkpoint("llama")), RolloutEngine)
