"""Are SGLang and Megatron-core on this package's kernels the same function, bit for bit? Random weights, which hide nothing.

    python -m benchmarks.engines.same_bits OUT.json [--spec specs/gpu_grpo_0_6b_exact.yaml]

A trained model hides small differences behind log-probs near zero; with random weights every token is as likely as the next,
and one flipped bit of one layer shows. The engine answers 512 prompts by 16 tokens in batches of 512, 64 and 200 (eager and in
CUDA graphs); the trainer scores all of it in micro-batches of two sizes. Exits with 1 where a log-prob differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines import random_model
from benchmarks.machine import machine
from miles_plan.backends.engine import Request
from miles_plan.backends.executor.operations.logprobs import compare_log_probs, joined_shares
from miles_plan.backends.megatron_engine.options import MegatronEngineOptions
from miles_plan.backends.megatron_engine.train_engine import MegatronTrainEngine
from miles_plan.backends.sglang_engine.rollout_engine import SglangOptions, SglangRolloutEngine
from miles_plan.backends.sglang_engine.server_arguments import server_arguments
from miles_plan.data.batch import SampleBatch
from miles_plan.ir.layout import TrainLayout
from miles_plan.ir.options import SamplingOptions
from miles_plan.ir.plan import Plan, read_plan

BATCHES = (512, 64, 512, 200)
BUDGETS_TOKENS = (8192, 1024)


def requests() -> list[Request]:
    """64 prompts of 5 to 8 bytes, eight samples each."""
    draw = np.random.default_rng(0)
    prompts = [tuple(int(each) for each in draw.integers(0, 256, draw.integers(5, 9))) for _ in range(64)]
    return [Request(sample_id=at, prompt_id=at // 8, prompt=prompts[at // 8]) for at in range(512)]


def answers(plan: Plan, model: Path, log: Path) -> Iterator[tuple[int, list[SampleBatch]]]:
    """The engine's answers, by the size of its batches."""
    group = next(each for each in plan.graph.groups if each.role == "rollout")
    config = dict(plan.run.model.hf_config or {})
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    options = SglangOptions(
        arguments=server_arguments(plan, group, model_directory=model), gpus=(gpu,), log=log,
        vocab_size=config["vocab_size"], max_positions=config["max_position_embeddings"],
    )  # fmt: skip
    engine = SglangRolloutEngine(options)
    try:
        sampling, asked = SamplingOptions(max_response_tokens=16, temperature=1.0), requests()
        for size in BATCHES:
            yield size, [engine.generate(asked[at : at + size], sampling, min_version=0) for at in range(0, 512, size)]
    finally:
        engine.close()


def differing(trainer: MegatronTrainEngine, batches: list[SampleBatch]) -> dict[str, Any]:
    """The trainer's log-probs of the batches against the engine's."""
    compared = mismatches = 0
    worst = 0.0
    for batch in batches:
        scored = trainer.log_probs(batch, model="policy", temperature=1.0, replay_routing=False)
        found = compare_log_probs(batch, joined_shares(batch, [scored])[0], int(batch.weight_version[0]))
        compared, mismatches = compared + found.tokens_compared, mismatches + found.mismatches
        worst = max(worst, found.max_abs_diff)
    return {"tokens": compared, "differ": mismatches, "max_abs_diff": worst}


def main() -> int:
    """Generate, score, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--spec", type=Path, default=Path("specs/gpu_grpo_0_6b_exact.yaml"))
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        compiled, model = Path(folder) / "plan.json", Path(folder) / "model"
        command = [sys.executable, "-m", "miles_plan", "compile", str(asked.spec), "--out", str(compiled)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        plan = read_plan(compiled)
        random_model.make(plan, model)
        began = time.perf_counter()
        made = list(answers(plan, model, asked.out.with_suffix(".log")))
        print(f"engine: {time.perf_counter() - began:.0f} s", flush=True)
        for budget in BUDGETS_TOKENS:
            trainer = MegatronTrainEngine(
                MegatronEngineOptions(
                    model_directory=model, host_directory=Path(folder) / "host", layout=TrainLayout(), dtype="bfloat16",
                    micro_batch_tokens=budget, device="cuda", layer_spec="batch_invariant",
                ),
                rank=0,
                rendezvous=None,
            )  # fmt: skip
            for size, batches in made:
                rows.append({"engine_batch": size, "micro_batch_tokens": budget, **differing(trainer, batches)})
                print(rows[-1], flush=True)
                asked.out.write_text(json.dumps({"machine": machine(), "spec": plan.name, "rows": rows}, indent=1) + "\n")
            trainer.close()
    return int(any(row["differ"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
