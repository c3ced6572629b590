"""What a trainer's pass and step add on the GPU to what it holds, by tokens fed and rows scored: the planner's terms, measured.

    python -m benchmarks.engines.trainer_memory OUT.json [--models dense moe] [--trainers megatron invariant fsdp]

Each trainer is built once. Then one micro-batch after another, of different tokens and different shares of responses, is scored
and trained on; peaks are fitted as a constant, bytes a token and bytes a scored row. A row of the vocabulary in bf16 is
2 x 151,936 bytes: the fit says how many such copies exist at the peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines.trainers_on_gpus import ADAM, MODELS, POLICY, WORK, Case, build, old_log_probs, peak
from benchmarks.machine import machine
from miles_plan.data.batch import SampleBatch

LENGTH = 128
POINTS = ((2048, 64), (4096, 32), (4096, 64), (4096, 120), (8192, 16), (8192, 64), (8192, 112))  # tokens, of each 128 scored
TRAINERS: dict[str, dict[str, Any]] = {
    "megatron": {},
    "invariant": {"options": {"layer_spec": "batch_invariant"}},
    "fsdp": {"engine": "fsdp"},
}
LOSSES = {"step": POLICY, "step_without_entropy": replace(POLICY, entropy_coef=0.0)}


def batch_of(model: str, tokens: int, scored: int, *, length: int = LENGTH) -> SampleBatch:
    """Sequences of `length` random tokens, whose last `scored` are responses; experts at random."""
    draw, config, samples = np.random.default_rng(0), MODELS[model], tokens // length
    routing = None
    if "num_experts" in config:
        shape = (tokens, config["num_hidden_layers"], config["num_experts"])
        routing = np.argsort(draw.random(shape), axis=-1)[..., : config["num_experts_per_tok"]].astype(np.uint8)
    count = samples * scored
    batch = SampleBatch(
        sample_id=np.arange(samples, dtype=np.int64),
        prompt_id=np.arange(samples, dtype=np.int64),
        tokens=draw.integers(0, config["vocab_size"], size=tokens).astype(np.int32),
        prompt_length=np.full(samples, length - scored, dtype=np.int32),
        length=np.full(samples, length, dtype=np.int32),
        stopped=np.ones(samples, dtype=bool),
        rollout_log_probs=np.zeros(count, dtype=np.float32),
        weight_version=np.zeros(count, dtype=np.int32),
        routing=routing,
    )
    return batch.with_columns(advantage=draw.standard_normal(count).astype(np.float32))


def measure(name: str, model: str) -> dict[str, Any]:
    """One trainer: every point's peaks above what it holds at rest, and the fit."""
    import torch

    engine = build(Case(name, model, **TRAINERS[name]), 0, None)
    rows: list[dict[str, Any]] = []
    try:
        for tokens, scored in (POINTS[-1], *POINTS):  # the first makes workspaces and optimizer states
            batch = batch_of(model, tokens, scored)
            gc.collect()
            torch.cuda.empty_cache()
            rest, row = torch.cuda.memory_allocated(), {"tokens": tokens, "rows": scored * tokens // LENGTH}
            with peak(row, "score", rest):
                found = engine.log_probs(batch, model="policy", temperature=1.0, replay_routing=batch.routing is not None)
            batch = batch.with_columns(old_log_probs=old_log_probs(batch, found, engine))
            for what, loss in LOSSES.items():
                torch.cuda.empty_cache()
                with peak(row, what, rest):
                    engine.train_step(batch, loss=loss, optimizer=ADAM, replay_routing=batch.routing is not None)
            rows.append({**row, "rest_bytes": rest})
    finally:
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    rows = rows[1:]
    return {"trainer": name, "model": model, "points": rows, "fit": {each: fit(rows, each) for each in ("score", *LOSSES)}}


def fit(rows: list[dict[str, Any]], what: str) -> dict[str, float]:
    """Least squares of the peak; worst: the largest residual over the peak."""
    design = np.array([[1.0, row["tokens"], row["rows"]] for row in rows])
    peaks = np.array([row[f"{what}_peak_bytes"] for row in rows], dtype=np.float64)
    found, *_ = np.linalg.lstsq(design, peaks, rcond=None)
    worst = float(np.abs(design @ found / peaks - 1).max())
    return {"constant_bytes": found[0], "bytes_per_token": found[1], "bytes_per_row": found[2], "worst": worst}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["dense", "moe"], choices=sorted(MODELS))
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    asked = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    found: list[dict[str, Any]] = []
    for model in asked.models:
        for name in asked.trainers:
            try:
                found.append(measure(name, model))
            except Exception:
                found.append({"trainer": name, "model": model, "error": traceback.format_exc()[-1500:]})
            print(json.dumps({key: value for key, value in found[-1].items() if key != "points"}), flush=True)
            asked.out.write_text(json.dumps({"machine": machine(), "trainers": found}, indent=1) + "\n", encoding="utf-8")
    return int(any("error" in each for each in found))


if __name__ == "__main__":
    sys.exit(main())
