"""The cluster trainers on real GPUs: do all layouts compute the same, what do their phases hold, how long do they take.

    python -m benchmarks.engines.trainers_on_gpus OUT.jsonl [--gpus 2] [--only NAME,NAME] [--limit-s 200]

Each GPU has one process: first each runs its own list of one-GPU cases, then all run the cases of several ranks, those that
say most first. A case prints and writes one line a rank. One that fails says why; one that takes longer than it may says where
its ranks stand; the processes of either are replaced before the next case. Weights are random.
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
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from miles_plan.data.batch import SampleBatch, ragged_rows
from miles_plan.ir.layout import TrainLayout
from miles_plan.ir.options import LossOptions, OptimizerOptions

CASE_LIMIT_S = 60.0  # kernels that torch and Triton compile for a first case take half of it
PEERS_LIMIT_S = 5.0  # for the other ranks, once one has failed
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
    """One trainer to build and measure. model: of MODELS; options: of the engine, beyond the common ones; batch: of LENGTHS."""

    name: str
    model: str
    layout: TrainLayout = field(default_factory=TrainLayout)
    engine: str = "megatron"
    options: dict[str, Any] = field(default_factory=dict)
    phases: bool = False  # measure offloading, streaming and times too
    like: str = ""  # the case whose log-probs, loss, gradient norm and times it should have
    batch: str = ""  # "small" or "full" as the model is, if not said
    limit_s: float = CASE_LIMIT_S


SP = {"tp": 2, "sequence_parallel": True}
COMPILES_S = 150.0  # our kernels' variants, which Triton compiles when they are first used
INVARIANT = {"layer_spec": "batch_invariant"}
ALONE = [
    Case("dense", "dense", phases=True),
    Case("dense fsdp", "dense", engine="fsdp", phases=True, like="dense"),
    Case("answers", "dense", batch="answers"),
    Case("answers fsdp", "dense", engine="fsdp", batch="answers", like="answers"),
    Case("dense recompute full", "dense", options={"recompute": "full"}, phases=True, like="dense"),
    Case("dense optimizer offload", "dense", options={"optimizer_offload": True}, like="dense"),
    Case("dense fsdp recompute full", "dense", engine="fsdp", options={"recompute": "full"}, like="dense fsdp"),
]
ALONE_TOO = [
    Case("small", "small"),
    Case("small_moe", "small_moe"),
    Case("small fsdp", "small", engine="fsdp", like="small"),
    Case("small_moe fsdp", "small_moe", engine="fsdp", like="small_moe"),
    Case("small local", "small", options={"layer_spec": "local"}, like="small"),
    Case("moe", "moe", phases=True),
    Case("small fp8", "small", options={"fp8": True}, like="small"),
    Case("moe recompute experts", "moe", options={"recompute": "selective", "recompute_modules": ("moe",)}, like="moe"),
    Case("small_moe local", "small_moe", options={"layer_spec": "local"}, like="small_moe"),
    Case("small invariant", "small", options=INVARIANT, like="small", limit_s=COMPILES_S),
    Case("small_moe invariant", "small_moe", options=INVARIANT, like="small_moe", limit_s=COMPILES_S),
]
TOGETHER = [
    Case("small pp2", "small", TrainLayout(pp=2), like="small"),
    Case("small fsdp dp2", "small", TrainLayout(dp=2), engine="fsdp", like="small"),
    Case("small cp2", "small", TrainLayout(cp=2), like="small"),
    Case("small_moe ep2", "small_moe", TrainLayout(dp=2, ep=2), like="small_moe"),
    Case("small tp2 sp", "small", TrainLayout(**SP), like="small"),
    Case("small pp2 vpp2", "small", TrainLayout(pp=2, vpp=2), like="small"),
    Case("small dp2", "small", TrainLayout(dp=2), like="small"),
    Case("small_moe tp2 sp ep2", "small_moe", TrainLayout(**SP, ep=2), like="small_moe"),
    Case("small_moe tp2 sp etp2", "small_moe", TrainLayout(**SP, etp=2), like="small_moe"),
    Case("dense dp2", "dense", TrainLayout(dp=2), phases=True, like="dense"),
    Case("dense fsdp dp2", "dense", TrainLayout(dp=2), engine="fsdp", phases=True, like="dense dp2"),
    Case("small tp2", "small", TrainLayout(tp=2), like="small"),
    Case("small tp2 invariant", "small", TrainLayout(tp=2), options=INVARIANT, like="small invariant", limit_s=COMPILES_S),
]
LENGTHS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {  # tokens of each sample
    "full": lambda _: np.full(16, 2048),
    "small": lambda draw: draw.integers(60, 400, size=12),
    "answers": lambda draw: draw.integers(12, 24, size=256),  # the quickstart's sums and what they come to
}


def batch_of(case: Case) -> SampleBatch:
    """Random tokens in samples of the case's lengths; experts at random."""
    draw = np.random.default_rng(0)
    config = MODELS[case.model]
    lengths = LENGTHS[case.batch or ("small" if case.model.startswith("small") else "full")](draw)
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

        return FsdpTrainEngine(FsdpEngineOptions(**{**common, **case.options}), rank=rank, rendezvous=rendezvous)
    from miles_plan.backends.megatron_engine.options import MegatronEngineOptions
    from miles_plan.backends.megatron_engine.train_engine import MegatronTrainEngine

    return MegatronTrainEngine(MegatronEngineOptions(**{**common, **case.options}), rank=rank, rendezvous=rendezvous)


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

    batch = batch_of(case)
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
    found["weights_sha256"] = engine.weights_sha256()
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


def work(gpu: str, orders: Any, answers: Any) -> None:
    """One GPU's process: run each case that is ordered, answer with a line. The first failure is its last case."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    torch.zeros(1, device="cuda")
    for rank, rendezvous, case in iter(orders.get, None):
        with stacks_of(case, rank).open("w") as stacks:
            faulthandler.dump_traceback_later(case.limit_s - 2.0, exit=False, file=stacks)
            try:
                answers.put(measure(case, rank, rendezvous))
            except Exception:
                answers.put({"case": case.name, "rank": rank, "error": traceback.format_exc()[-1800:]})
                return
            finally:
                faulthandler.cancel_dump_traceback_later()


def stacks_of(case: Case, rank: int) -> Path:
    """Where a rank that takes too long leaves what its threads are doing."""
    return WORK / f"stacks-{case.name.replace(' ', '-')}-{rank}"


class Lane:
    """The process of one GPU, replaced after a failure."""

    def __init__(self, gpu: str) -> None:
        """gpu: as CUDA_VISIBLE_DEVICES names it."""
        self.gpu = gpu
        self.start()

    def start(self) -> None:
        """A fresh process, with fresh queues: nothing of an older one can answer."""
        context = multiprocessing.get_context("spawn")
        self.orders, self.answers = context.Queue(), context.Queue()
        self.process = context.Process(target=work, args=(self.gpu, self.orders, self.answers), daemon=True)
        self.process.start()

    def replace(self) -> None:
        """End the process, whatever it does, and start another."""
        self.process.kill()
        self.process.join()
        self.start()

    def poll(self, case: Case, rank: int) -> dict[str, Any] | None:
        """The answer if it has come; an error if none can come any more."""
        ended = not self.process.is_alive()  # before a look at what it left behind
        try:
            found: dict[str, Any] = self.answers.get(timeout=0.02)
        except queue.Empty:
            if not ended:
                return None
            return {"case": case.name, "rank": rank, "error": f"its process ended with {self.process.exitcode}"}
        return found


def run_case(lanes: Sequence[Lane], case: Case, deadline: float) -> list[dict[str, Any]]:
    """The case on these lanes, a rank each; they are fresh again if it failed. deadline: of time.monotonic."""
    meet = f"file://{WORK}/meet{os.getpid()}-{case.name.replace(' ', '-')}" if len(lanes) > 1 else None
    until = min(deadline, time.monotonic() + case.limit_s)
    for rank, lane in enumerate(lanes):
        lane.orders.put((rank, meet, case))
    rows: dict[int, dict[str, Any]] = {}
    while len(rows) < len(lanes) and time.monotonic() < until:
        for rank in set(range(len(lanes))) - set(rows):
            if (row := lanes[rank].poll(case, rank)) is None:
                continue
            rows[rank] = row
            if "error" in row:
                until = min(until, time.monotonic() + PEERS_LIMIT_S)
    rows |= {rank: late(case, rank) for rank in set(range(len(lanes))) - set(rows)}
    if any("error" in row for row in rows.values()):
        for lane in lanes:
            lane.replace()
    return [rows[rank] for rank in range(len(lanes))]


def late(case: Case, rank: int) -> dict[str, Any]:
    """The line of a rank that has not answered: where it stands."""
    stacks = stacks_of(case, rank)
    found = stacks.read_text()[-2500:] if stacks.is_file() else ""
    return {"case": case.name, "rank": rank, "error": f"no answer in time; {found or 'no stack yet'}"}


def compare(rows: dict[str, list[dict[str, Any]]], case: Case, own: list[dict[str, Any]]) -> None:
    """Say how far the case is from the one it should be like."""
    like = rows.get(case.like)
    if not like or any("error" in each for each in (*like, *own)):
        return
    ours, theirs = (_in_order(case, each) for each in (own, like))
    steps = [[row["steps"][number] for row in (own[0], like[0])] for number in (0, 2)]
    own[0]["against"] = {
        "case": case.like,
        "log_prob_max": float(np.abs(ours - theirs).max()),
        "log_prob_mean": float(np.abs(ours - theirs).mean()),
        "loss": [a["loss"] - b["loss"] for a, b in steps],
        "grad_norm": [a["grad_norm"] / b["grad_norm"] - 1 for a, b in steps],
        "step_time": round(own[0]["step2_s"] / like[0]["step2_s"], 3),
    }


def _in_order(case: Case, rows: list[dict[str, Any]]) -> np.ndarray:
    batch = batch_of(case)
    flat = np.full(len(batch.rollout_log_probs), np.nan)
    for row in rows:
        index, values = np.asarray(row["scores"][0], dtype=np.int64), np.asarray(row["scores"][1])
        flat[ragged_rows(batch.response_start[index], batch.response_length[index])] = values
    return flat


@dataclass
class Session:
    """Lanes under one deadline (of time.monotonic), and the rows of every case so far, written as they come."""

    lanes: list[Lane]
    deadline: float
    sink: Any
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    writing: threading.Lock = field(default_factory=threading.Lock)

    def run(self, lanes: Sequence[Lane], cases: Sequence[Case]) -> None:
        """The cases one after the other, a rank on each of these lanes."""
        for case in cases:
            if time.monotonic() < self.deadline:
                own = run_case(lanes, case, self.deadline)
                with self.writing:
                    self.rows[case.name] = own
                    compare(self.rows, case, own)
                    report(self.sink, own)


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
    only = {each.strip() for each in asked.only.split(",")} - {""}
    alone = [ALONE, ALONE_TOO] if asked.gpus > 1 else [[*ALONE_TOO, *ALONE]]
    alone = [[case for case in cases if not only or case.name in only] for cases in alone]
    together = [case for case in TOGETHER if asked.gpus > 1 and (not only or case.name in only)]
    with asked.out.open("w") as sink:
        session = Session([Lane(gpu) for gpu in visible(asked.gpus)], deadline, sink)
        with ThreadPoolExecutor(len(session.lanes)) as threads:
            list(threads.map(lambda lane, cases: session.run([lane], cases), session.lanes, alone))
        session.run(session.lanes, together)
    for lane in session.lanes:
        lane.process.kill()


def visible(gpus: int) -> list[str]:
    """The first of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:gpus] if named else [str(gpu) for gpu in range(gpus)]


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
