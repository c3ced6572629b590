"""One engine in a process of its own: what it is asked, what it refuses, and how its end is noticed.

The process, the socket and the weights on their way are real; `stand_in` takes the place of SGLang, which needs a GPU.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from miles_plan.backends.engine import EngineError, Request, RolloutEngine, WeightBucket
from miles_plan.backends.sglang_engine.engine_link import EngineDiedError, EngineLink, bars, last_error
from miles_plan.backends.sglang_engine.rollout_engine import SglangOptions, SglangRolloutEngine, launch
from miles_plan.backends.sglang_engine.server_arguments import ServerArguments
from miles_plan.backends.weight_transport.shared_memory import BucketPlan, SharedMemoryWriter
from miles_plan.ir.options import SamplingOptions

STAND_IN = Path(__file__).parent / "stand_in"
OPTIONS = SamplingOptions(max_response_tokens=3)
ARGUMENTS = ServerArguments(
    model_path="model",
    dtype="bfloat16",
    quantization=None,
    kv_cache_dtype="auto",
    tp_size=1,
    pp_size=1,
    ep_size=1,
    dp_size=1,
    enable_dp_attention=False,
    mem_fraction_static=0.5,
    max_total_tokens=1000,
    max_running_requests=8,
    chunked_prefill_size=8192,
    max_prefill_tokens=8192,
    page_size=16,
    disable_radix_cache=False,
    attention_backend="triton",
    sampling_backend="pytorch",
    cuda_graph_max_bs_decode=8,
    disable_prefill_cuda_graph=True,
    enable_deterministic_inference=False,
    enable_return_routed_experts=False,
    enable_memory_saver=True,
    random_seed=0,
)


@pytest.fixture
def with_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(STAND_IN), str(Path.cwd()))))


@pytest.fixture
def engine(with_stand_in: None, tmp_path: Path) -> Iterator[SglangRolloutEngine]:
    made = SglangRolloutEngine(options(tmp_path))
    yield made
    made.close()


def options(folder: Path, **changed: Any) -> SglangOptions:
    arguments = replace(ARGUMENTS, **changed)
    return SglangOptions(arguments=arguments, gpus=("0",), log=folder / "engine.log", vocab_size=50, max_positions=32)


def requests(*firsts: int) -> list[Request]:
    return [Request(sample_id=70 + at, prompt_id=at, prompt=(first, 5)) for at, first in enumerate(firsts)]


def buckets(writer: SharedMemoryWriter, version: int, value: float) -> list[WeightBucket]:
    """The model's one tensor, and an empty bucket before it."""
    plans = (BucketPlan(0, 0, (), False), BucketPlan(1, 0, ("norm.weight",), True))
    return [
        writer.write(version, plan, [(name, torch.full((4,), value)) for name in plan.names]) for plan in plans if plan.names
    ]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[SharedMemoryWriter]:
    made = SharedMemoryWriter(tmp_path)
    yield made
    made.close()


def send(engine: SglangRolloutEngine, made: list[WeightBucket]) -> None:
    for index, bucket in enumerate(made):
        engine.update_weights(replace(bucket, index=index))


def test_samples_come_back_with_the_version_that_made_them(engine: SglangRolloutEngine, writer: SharedMemoryWriter) -> None:
    assert isinstance(engine, RolloutEngine)
    first = engine.generate(requests(1, 2), OPTIONS, min_version=0)
    assert first.sequence(1).tolist() == [2, 5, 6, 7, 8]
    assert first.rollout_log_probs.tolist() == [-1.0] * 6
    send(engine, buckets(writer, 1, 0.25))
    assert engine.commit_weights(1) == 1
    second = engine.generate(requests(1), OPTIONS, min_version=1)
    assert second.rollout_log_probs.tolist() == [-0.25] * 3
    assert second.weight_version.tolist() == [1] * 3
    assert engine.generate([], OPTIONS, min_version=0).num_samples == 0


def test_nothing_is_served_between_two_versions(engine: SglangRolloutEngine, writer: SharedMemoryWriter) -> None:
    with pytest.raises(EngineError, match="version 0, 1 was asked for"):
        engine.generate(requests(1), OPTIONS, min_version=1)
    (bucket,) = buckets(writer, 1, 0.25)
    engine.update_weights(replace(bucket, index=0, last=False))
    for refused in (lambda: engine.generate(requests(1), OPTIONS, min_version=0), lambda: engine.commit_weights(1)):
        with pytest.raises(EngineError):
            refused()
    with pytest.raises(EngineError, match="bucket 0 of version 1 came, 1 was due"):
        engine.update_weights(replace(bucket, index=0))
    with pytest.raises(EngineError, match="bucket 3 of version 2 came, 0 was due"):
        engine.update_weights(replace(bucket, version=2, index=3))


def test_bytes_that_changed_on_the_way_are_refused_by_name(engine: SglangRolloutEngine, writer: SharedMemoryWriter) -> None:
    (bucket,) = buckets(writer, 1, 0.25)
    spoiled = replace(bucket, index=0, tensors=(replace(bucket.tensors[0], checksum="0" * 16),))
    with pytest.raises(EngineError, match=r"bucket 0 of version 1.*'norm\.weight'"):
        engine.update_weights(spoiled)
    with pytest.raises(EngineError, match="holds weights version -1"):
        engine.generate(requests(1), OPTIONS, min_version=0)


def test_a_probe_tells_whether_the_parameters_hold_what_was_sent(
    engine: SglangRolloutEngine, writer: SharedMemoryWriter
) -> None:
    send(engine, buckets(writer, 1, 0.25))
    probe = {"name": "norm.weight", "shape": [4], "row": 2, "column": 0, "value": 0.25}
    assert engine.probe([probe]) == []
    (wrong,) = engine.probe([probe, {**probe, "value": 0.5}])
    assert "norm.weight[2, 0] is 0.25 after the sync, the trainer has 0.5" in wrong


def test_a_sleeping_engine_serves_nothing_until_it_has_weights_again(
    engine: SglangRolloutEngine, writer: SharedMemoryWriter
) -> None:
    awake = engine.health()["device_bytes"]
    asleep = engine.sleep(["kv_cache", "weights"])
    assert all(asleep.device_bytes[part] < size for part, size in awake.items())
    with pytest.raises(EngineError, match="wake"):
        engine.generate(requests(1), OPTIONS, min_version=0)
    with pytest.raises(EngineError, match="weights are asleep"):
        send(engine, buckets(writer, 1, 0.25))
    engine.wake(["weights"])
    send(engine, buckets(writer, 1, 0.5))
    engine.commit_weights(1)
    with pytest.raises(EngineError, match=r"asleep \(kv_cache\)"):
        engine.generate(requests(1), OPTIONS, min_version=1)
    assert engine.wake(["kv_cache"]).device_bytes == awake
    assert engine.generate(requests(1), OPTIONS, min_version=1).rollout_log_probs.tolist() == [-0.5] * 3
    with pytest.raises(ValueError, match="not 'optimizer'"):
        engine.sleep(["optimizer"])


def test_a_request_that_cannot_be_is_named(engine: SglangRolloutEngine) -> None:
    for prompt in ((), (7,) * 30, (50,), (-1,)):
        with pytest.raises(EngineError, match="sample 99"):
            engine.generate([Request(sample_id=99, prompt_id=0, prompt=prompt)], OPTIONS, min_version=0)
    assert engine.health() == {
        "weight_version": 0,
        "running": 0,
        "generating_s": 0.0,
        "alive": True,
        "asleep": [],
        "device_bytes": {"weights": 1 << 30, "kv_cache": 5 << 29},
    }


def test_abort_ends_what_runs(engine: SglangRolloutEngine) -> None:
    threading.Timer(0.3, engine.abort).start()
    began = time.monotonic()
    with pytest.raises(EngineError, match="Aborted"):
        engine.generate(requests(14), OPTIONS, min_version=0)
    assert time.monotonic() - began < 10.0


def test_the_death_of_the_process_is_noticed_and_named(engine: SglangRolloutEngine) -> None:
    pid = engine.pid
    with pytest.raises(EngineDiedError, match=f"process {pid} ended by SIGKILL before it answered 'generate'"):
        engine.generate(requests(13), OPTIONS, min_version=0)
    assert not engine.health()["alive"]
    with pytest.raises(EngineDiedError):
        engine.generate(requests(1), OPTIONS, min_version=0)


def test_the_reason_is_the_last_error_that_was_printed() -> None:
    lines = [
        "Traceback (most recent call last):",
        "  File x",
        "RuntimeError: Blocked unsafe class loading (a.b)",
        "SIGQUIT received.",
    ]
    assert last_error(lines) == "RuntimeError: Blocked unsafe class loading (a.b)"
    assert last_error(["torch.OutOfMemoryError: CUDA out of memory."]) == "torch.OutOfMemoryError: CUDA out of memory."
    assert last_error(["no error here", "Errors: none"]) == ""


def test_an_engine_launched_early_waits_for_its_model_and_says_what_its_start_took(with_stand_in: None, tmp_path: Path) -> None:
    model = tmp_path / "config.json"
    link = launch(ARGUMENTS, gpus=("0",), log=tmp_path / "engine.log", name="sglang", needed=model)
    time.sleep(1.5)
    assert link.alive()
    model.touch()
    engine = SglangRolloutEngine(options(tmp_path), link)
    assert engine.generate(requests(1), OPTIONS, min_version=0).num_samples == 1
    assert engine.start_s.keys() == {"imports", "early", "engine"}
    assert engine.start_s["early"] >= 1.5
    engine.close()
    assert not link.alive()


def test_a_process_whose_model_never_comes_ends_with_its_owner(with_stand_in: None, tmp_path: Path) -> None:
    link = launch(ARGUMENTS, gpus=("0",), log=tmp_path / "engine.log", name="sglang", needed=tmp_path / "never")
    time.sleep(1.0)
    link._connection.close()  # what the owner's death looks like
    assert link._process.wait(10.0) == -9
    with pytest.raises(EngineError):
        launch(ARGUMENTS, gpus=("0",), log=tmp_path / "log", name="sglang", needed=tmp_path / "never").start(1.0)


def test_the_seconds_of_progress_bars_are_read_where_they_end() -> None:
    lines = [
        "Multi-thread loading shards:  50% Completed | 1/2 [00:01<00:01]",
        "Multi-thread loading shards: 100% Completed | 2/2 [00:02<00:00,  1s/it]",
        "Capturing batches (bs=1 avail_mem=125.25 GB): 100%|##########| 36/36 [01:04<00:00, 7.95it/s]",
    ]
    assert bars(lines) == {"Multi-thread loading shards": 2.0, "Capturing batches": 64.0}


def test_an_engine_that_runs_otherwise_than_asked_is_refused_and_ended(with_stand_in: None, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="page_size: asked for 16, runs with 1"):
        SglangRolloutEngine(options(tmp_path, model_path="other"))


def test_an_engine_that_does_not_start_says_why(with_stand_in: None, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"'start' failed: RuntimeError: Not enough memory"):
        SglangRolloutEngine(options(tmp_path, model_path="broken"))


def test_without_the_package_the_start_names_it(tmp_path: Path) -> None:
    link = EngineLink(ARGUMENTS.as_mapping(), log=tmp_path / "log", environment={"PYTHONPATH": str(Path.cwd())})
    with pytest.raises(EngineError, match="No module named 'sglang'"):
        link.start(60.0)
    assert not link.alive()
    link.close()


def test_an_answer_that_does_not_come_ends_the_engine(engine: SglangRolloutEngine) -> None:
    with pytest.raises(EngineError, match=r"'generate' was not answered in 1 s"):
        engine._link.call("generate", prompts=[[14]], sampling=[{"max_new_tokens": 1}], routed=None, deadline_s=1.0)
    assert not engine.health()["alive"]
