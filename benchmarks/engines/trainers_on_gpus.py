"""The cluster trainers on real GPUs: do all layouts compute the same, what do their phases hold, how long do they take.

    python -m benchmarks.engines.trainers_on_gpus OUT.jsonl [--gpus 2] [--only NAME,NAME] [--limit-s 200]

Each GPU has one process that lives through all cases: first each runs its own list of one-GPU cases, then all run the cases of
several ranks. A case prints and writes one line; one that fails says why and the next goes on. Weights are random.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import multiprocessing
import os
import queue
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from miles_plan.data.batch import SampleBatch, ragged_rows
from miles_plan.ir.layout import TrainLayout
from miles_plan.ir.options import LossOptions, OptimizerOptions

HANGS_AFTER_S = 22.0
WORK = Path(tempfile.gettempdir()) / "trainers_on_gpus"
DENSE: dict[str, Any] = {  # Qwen3-0.6B's shape
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {  # Qwen3-30B-A3B's, cut to two layers
    **DENSE,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
SMALL = {**DENSE, "num_hidden_layers": 4, "vocab_size": 32000, "tie_word_embeddings": False}
SMALL_MOE = {**MOE, "hidden_size": 1024, "num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 32000}
MODELS = {"dense": DENSE, "moe": MOE, "small": SMALL, "small_moe": SMALL_MOE}
POLICY = LossOptions(kind="policy_gradient", entropy_coef=0.001)
ADAM = OptimizerOptions(learning_rate=1e-5)


@dataclass(frozen=True)
class Case:
    """One trainer to build and measure. model: of MODELS; options: of the engine, beyond the common ones."""

    name: str
    model: str
    layout: TrainLayout = field(default_factory=TrainLayout)
    engine: str = "megatron"
    options: dict[str, Any] = field(default_factory=dict)
    phases: bool = False  # measure offloading, streaming and times too
    like: str = ""  # the case whose log-probs, loss and gradient norm it should have


SP = {"tp": 2, "sequence_parallel": True}
ALONE = [
    Case("dense", "dense", phases=True),
    Case("small", "small"),
    Case("small local", "small", options={"layer_spec": "local"}, like="small"),
    Case("small invariant", "small", options={"layer_spec": "batch_invariant"}, like="small"),
    Case("dense recompute full", "dense", options={"recompute": "full"}, phases=True, like="dense"),
    Case("dense optimizer offload", "dense", options={"optimizer_offload": True}, like="dense"),
    Case("small fsdp", "small", engine="fsdp", like="small"),
]
ALONE_TOO = [
    Case("small_moe", "small_moe"),
    Case("moe", "moe", phases=True),
    Case("small fp8", "small", options={"fp8": True}, like="small"),
    Case("moe recompute experts", "moe", options={"recompute": "selective", "recompute_modules": ("moe",)}, like="moe"),
    Case("small_moe local", "small_moe", options={"layer_spec": "local"}, like="small_moe"),
    Case("small_moe invariant", "small_moe", options={"layer_spec": "batch_invariant"}, like="small_moe"),
    Case("dense fsdp", "dense", engine="fsdp", phases=True, like="dense"),
]
TOGETHER = [
    Case("small tp2", "small", TrainLayout(tp=2), like="small"),
    Case("small pp2", "small", TrainLayout(pp=2), like="small"),
    Case("small dp2", "small", TrainLayout(dp=2), like="small"),
    Case("small cp2", "small", TrainLayout(cp=2), like="small"),
    Case("small_moe ep2", "small_moe", TrainLayout(dp=2, ep=2), like="small_moe"),
    Case("small fsdp dp2", "small", TrainLayout(dp=2), engine="fsdp", like="small"),
    Case("dense dp2", "dense", TrainLayout(dp=2), phases=True, like="dense"),
    Case("small_moe tp2 sp etp2", "small_moe", TrainLayout(**SP, etp=2), like="small_moe"),
    Case("small_moe tp2 sp ep2", "small_moe", TrainLayout(**SP, ep=2), like="small_moe"),
    Case("small tp2 sp", "small", TrainLayout(**SP), like="small"),
    Case("small tp2 invariant", "small", TrainLayout(tp=2), options={"layer_spec": "batch_invariant"}, like="small invariant"),
    Case("small pp2 vpp2", "small", TrainLayout(pp=2, vpp=2), like="small"),
]


def batch_of(model: str) -> SampleBatch:
    """Random tokens: 16 samples of 2048 for the full shapes, 12 of different lengths for the small; experts at random."""
    draw = np.random.default_rng(0)
    config = MODELS[model]
    lengths = draw.integers(60, 400, size=12) if model.startswith("small") else np.full(16, 2048)
    prompt_length = np.minimum(lengths // 4, 256).astype(np.int32)
    total, count = int(lengths.sum()), int((lengths - prompt_length).sum())
    routing = None
    if "num_experts" in config:
        shape = (total, config["num_hidden_layers"], config["num_experts"])
        routing = np.argsort(draw.random(shape, dtype=np.float32), axis=-1)[..., : config["num_experts_per_tok"]].astype(
            np.uint8
        )
    samples = len(lengths)
    batch = SampleBatch(
        sample_id=np.arange(samples, dtype=np.int64),
        prompt_id=np.arange(samples, dtype=np.int64),
        tokens=draw.integers(0, config["vocab_size"], size=total).astype(np.int32),
        prompt_length=prompt_length,
        length=lengths.astype(np.int32),
        stopped=np.ones(samples, dtype=bool),
        rollout_log_probs=np.zeros(count, dtype=np.float32),
        weight_version=np.zeros(count, dtype=np.int32),
        routing=routing,
    )
    advantage = np.repeat(draw.standard_normal(samples), batch.response_length).astype(np.float32)
    return batch.with_columns(advantage=advantage)


def make_checkpoint(model: str) -> Path:
    """A Hugging Face folder with random weights, made on the GPU the first time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from miles_plan.backends.torch_engine.weights import full_names
    from miles_plan.backends.training.decoder_config import decoder_config

    folder = WORK / model
    if folder.exists():
        return folder
    fields = dict(MODELS[model])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    aside = WORK / f".{model}-{os.getpid()}"
    aside.mkdir(parents=True)
    config.save_pretrained(aside)
    torch.manual_seed(0)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else _normal(shape)
        for name, shape in full_names(decoder_config(config)).items()
    }
    save_file(tensors, aside / "model.safetensors", {"format": "pt"})
    try:
        aside.rename(folder)
    except OSError:  # the other GPU's process was first
        shutil.rmtree(aside)
    return folder


def _normal(shape: tuple[int, ...]) -> Any:
    import torch

    return (torch.randn(shape, device="cuda") * 0.02).bfloat16().cpu()


def build(case: Case, rank: int, rendezvous: str | None) -> Any:
    """The case's engine."""
    common = {
        "model_directory": make_checkpoint(case.model),
        "host_directory": WORK / "host",
        "layout": case.layout,
        "dtype": "bfloat16",
        "micro_batch_tokens": 1024 if case.model.startswith("small") else 8192,
        "device": "cuda",
    }
    if case.engine == "fsdp":
        from miles_plan.backends.fsdp_engine.options import FsdpEngineOptions
        from miles_plan.backends.fsdp_engine.train_engine import FsdpTrainEngine

        return FsdpTrainEngine(FsdpEngineOptions(**common, **case.options), rank=rank, rendezvous=rendezvous)
    from miles_plan.backends.megatron_engine.options import MegatronEngineOptions
    from miles_plan.backends.megatron_engine.train_engine import MegatronTrainEngine

    return MegatronTrainEngine(MegatronEngineOptions(**common, **case.options), rank=rank, rendezvous=rendezvous)


def measure(case: Case, rank: int, rendezvous: str | None) -> dict[str, Any]:
    """Build, score, step; with `phases` also offload and stream. Bytes are what this case added to the process."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    found: dict[str, Any] = {"case": case.name, "rank": rank, "layout": str(case.layout), "base_bytes": base}
    with timed(found, "build_s"):
        engine = build(case, rank, rendezvous)
    try:
        _measure(case, engine, found, base)
    finally:
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    found["left_bytes"] = torch.cuda.memory_allocated() - base
    return found


def _measure(case: Case, engine: Any, found: dict[str, Any], base: int) -> None:
    import torch

    batch = batch_of(case.model)
    replay = batch.routing is not None
    found["built_bytes"] = torch.cuda.memory_allocated() - base
    with peak(found, "log_probs", base):
        scored = engine.log_probs(batch, model="policy", temperature=1.0, replay_routing=replay)
    found["routing"] = (scored.routing_mismatches, scored.routing_compared)
    with timed(found, "log_probs_again_s"):
        again = engine.log_probs(batch, model="policy", temperature=1.0, replay_routing=replay)
    found["same_bits_twice"] = bool((again.log_probs == scored.log_probs).all())
    batch = batch.with_columns(old_log_probs=old_log_probs(batch, scored, engine))
    found["steps"] = []
    for number in range(3):
        with peak(found, f"step{number}", base):
            metrics = engine.train_step(batch, loss=POLICY, optimizer=ADAM, replay_routing=replay)
        found["steps"].append(metrics)
    found["after_step_bytes"] = torch.cuda.memory_allocated() - base
    found["parts"] = dict(engine.memory().device_bytes)
    found["scores"] = (scored.sample_index.tolist(), scored.log_probs.astype(float).round(6).tolist())
    if case.phases:
        _measure_phases(engine, found, base)


def _measure_phases(engine: Any, found: dict[str, Any], base: int) -> None:
    import torch

    with timed(found, "sha256_s"):
        before = engine.weights_sha256()
    for _ in range(2):
        with timed(found, "stream_s"):
            found["stream_bytes"] = sum(each.layout.size_bytes for each in engine.stream_weights(1, bucket_bytes=1 << 29))
    gc.collect()
    parts = ["weights", "gradients", "optimizer", "reference"]
    for _ in range(2):
        with timed(found, "offload_s"):
            engine.offload(parts)
        found["offloaded_bytes"] = torch.cuda.memory_allocated() - base
        free, total = torch.cuda.mem_get_info()
        found["device_used_offloaded_bytes"] = total - free
        with timed(found, "onload_s"):
            engine.onload(parts)
    found["same_after_offload"] = engine.weights_sha256() == before


def old_log_probs(batch: SampleBatch, scored: Any, engine: Any) -> np.ndarray:
    """Every rank's scores in the batch's order."""
    import torch
    import torch.distributed as dist

    flat = np.zeros(len(batch.rollout_log_probs), dtype=np.float32)
    index = scored.sample_index
    flat[ragged_rows(batch.response_start[index], batch.response_length[index])] = scored.log_probs
    whole = torch.from_numpy(flat).cuda()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(whole)
    return np.asarray(whole.cpu().numpy())


@contextmanager
def timed(found: dict[str, Any], name: str) -> Iterator[None]:
    """Seconds of a block, the GPU's work included; the last time counts."""
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    yield
    torch.cuda.synchronize()
    found[name] = round(time.perf_counter() - began, 4)


@contextmanager
def peak(found: dict[str, Any], name: str, base: int) -> Iterator[None]:
    """Seconds and peak bytes of a block."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    with timed(found, f"{name}_s"):
        yield
    found[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated() - base
    found[f"{name}_reserved_bytes"] = torch.cuda.max_memory_reserved()


def work(gpu: int, orders: Any, answers: Any) -> None:
    """One GPU's process: run each case that is ordered, answer with a line."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    for rank, rendezvous, case in iter(orders.get, None):
        faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=False)  # where a case hangs
        try:
            answers.put(measure(case, rank, rendezvous))
        except Exception:
            answers.put({"case": case.name, "rank": rank, "error": traceback.format_exc()[-1800:]})
            leave_groups()


def leave_groups() -> None:
    """End what a failed case left, so that the next can begin."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def compare(rows: dict[str, list[dict[str, Any]]], case: Case, own: list[dict[str, Any]]) -> None:
    """Say how far the case is from the one it should be like."""
    like = rows.get(case.like)
    if not like or any("error" in each for each in (*like, *own)):
        return
    ours, theirs = (_in_order(case.model, each) for each in (own, like))
    steps = [[row["steps"][number] for row in (own[0], like[0])] for number in (0, 2)]
    own[0]["against"] = {
        "case": case.like,
        "log_prob_max": float(np.abs(ours - theirs).max()),
        "log_prob_mean": float(np.abs(ours - theirs).mean()),
        "loss": [a["loss"] - b["loss"] for a, b in steps],
        "grad_norm": [a["grad_norm"] / b["grad_norm"] - 1 for a, b in steps],
    }


def _in_order(model: str, rows: list[dict[str, Any]]) -> np.ndarray:
    batch = batch_of(model)
    flat = np.full(len(batch.rollout_log_probs), np.nan)
    for row in rows:
        index, values = np.asarray(row["scores"][0], dtype=np.int64), np.asarray(row["scores"][1])
        flat[ragged_rows(batch.response_start[index], batch.response_length[index])] = values
    return flat


def main() -> None:
    """Run all cases within the time limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--only", default="", help="names of cases, separated by commas")
    parser.add_argument("--limit-s", type=float, default=200.0)
    asked = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    deadline = time.monotonic() + asked.limit_s
    context = multiprocessing.get_context("spawn")
    lanes = [(context.Queue(), context.Queue()) for _ in range(asked.gpus)]
    workers = [context.Process(target=work, args=(gpu, *lane), daemon=True) for gpu, lane in enumerate(lanes)]
    for worker in workers:
        worker.start()
    rows: dict[str, list[dict[str, Any]]] = {}
    alone = [ALONE, ALONE_TOO] if asked.gpus > 1 else [[*ALONE, *ALONE_TOO]]
    only = {each.strip() for each in asked.only.split(",")} - {""}
    wanted = [[case for case in cases if not only or case.name in only] for cases in alone]
    with asked.out.open("w") as sink:
        for lane, cases in zip(lanes, wanted, strict=False):
            for case in cases:
                lane[0].put((0, None, case))
        for lane, cases in zip(lanes, wanted, strict=False):
            for case in cases:
                rows[case.name] = [_answer(lane, case, 0, deadline)]
        for case in (case for cases in wanted for case in cases):
            compare(rows, case, rows[case.name])
            report(sink, rows[case.name])
        for number, case in enumerate(TOGETHER if asked.gpus > 1 else ()):
            if (only and case.name not in only) or time.monotonic() > deadline:
                continue
            for rank, lane in enumerate(lanes):
                lane[0].put((rank, f"file://{WORK}/meet{os.getpid()}-{number}", case))
            rows[case.name] = [_answer(lane, case, rank, deadline) for rank, lane in enumerate(lanes)]
            compare(rows, case, rows[case.name])
            report(sink, rows[case.name])
    for worker in workers:
        worker.kill()


def _answer(lane: Any, case: Case, rank: int, deadline: float) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = lane[1].get(timeout=max(1.0, deadline - time.monotonic()))
    except queue.Empty:
        return {"case": case.name, "rank": rank, "error": "no answer within the limit"}
    return answer


def report(sink: Any, rows: list[dict[str, Any]]) -> None:
    """One JSON line a rank, and one line to read."""
    for row in rows:
        sink.write(json.dumps({key: value for key, value in row.items() if key != "scores"}) + "\n")
        sink.flush()
        if "error" in row:
            print(f"{row['case']:26s} rank {row['rank']} FAILED {row['error'][-700:]}", flush=True)
            continue
        gib = {key: row[key] / 2**30 for key in ("built_bytes", "log_probs_peak_bytes", "step2_peak_bytes")}
        print(
            f"{row['case']:26s} rank {row['rank']} build {row['build_s']:5.1f} s  score {row['log_probs_again_s']:.3f} s  "
            f"step {row['step2_s']:.3f} s  GiB {gib['built_bytes']:.2f} {gib['log_probs_peak_bytes']:.2f} "
            f"{gib['step2_peak_bytes']:.2f}  loss {row['steps'][0]['loss']:.5f} norm {row['steps'][0]['grad_norm']:.4f}  "
            f"{row.get('against', '')}",
            flush=True,
        )


if __name__ == "__main__":
    main()
