"""How fast the cost models are: layouts priced a second, a rollout simulated, every published row validated.

python -m benchmarks.bench_pricing --out benchmarks/results/pricing_cpu.json

Prints one line a figure and exits with 1 if one misses its limit. A search prices every layout of a cluster under a few
dozen options; ten thousand GPUs have some three thousand layouts of a trillion-parameter model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.machine import machine
from miles_plan.catalog.gpus import cluster_of, find_gpu
from miles_plan.catalog.models import find_model
from miles_plan.cost.lengths import fit_lengths
from miles_plan.cost.rollout_time import RolloutWorkload, simulate_rollout
from miles_plan.cost.train_options import TrainMemoryOptions
from miles_plan.cost.train_time import TrainTimeOptions, price_train_layouts, workload_of_lengths
from miles_plan.cost.validate import load_rows, validate
from miles_plan.ir.layout import RolloutLayout, TrainLayout

ROWS = Path(__file__).parent.parent / "tests" / "cost" / "rows" / "published_numbers.jsonl"
GPUS = 10_240
LIMITS_S = {"price layouts": 0.5, "simulate a rollout": 0.1, "validate": 10.0}


def layouts(gpus: int, experts: int) -> Iterator[TrainLayout]:
    """Every power-of-two layout of so many GPUs."""
    powers = [1 << at for at in range(10)]
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4, 8, 16, 32):
            for cp in (1, 2, 4, 8):
                if gpus % (tp * pp * cp):
                    continue
                dp = gpus // (tp * pp * cp)
                for ep in powers:
                    if experts % ep == 0 and (tp * cp * dp) % ep == 0:
                        yield TrainLayout(tp=tp, pp=pp, cp=cp, dp=dp, ep=ep, sequence_parallel=tp > 1)


def best_of(repeats: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def measure() -> dict[str, float]:
    """Every figure in seconds, and how many layouts were priced."""
    model = find_model("kimi-k2")
    every = list(layouts(GPUS, model.moe.experts if model.moe else 1))
    workload = workload_of_lengths([8192.0] * 4096, tokens_per_gpu=16384)
    cluster = cluster_of("h200", GPUS // 8)
    memory, times = TrainMemoryOptions(tokens_per_gpu=16384, recompute="full"), TrainTimeOptions(recompute="full")
    rollout = RolloutWorkload(prompts=1024, samples_per_prompt=16, prompt_tokens=500, responses=fit_lengths(16384, 4000, 15000))
    engines, gpu = RolloutLayout(engines=64, tp=2), find_gpu("h200")
    small, rows = find_model("qwen3-30b-a3b"), load_rows(ROWS)
    return {
        "layouts": float(len(every)),
        "price layouts": best_of(3, lambda: price_train_layouts(model, every, workload, cluster, memory, times)),
        "simulate a rollout": best_of(3, lambda: simulate_rollout(small, engines, rollout, gpu, 400_000)),
        "rows": float(len(rows)),
        "validate": best_of(1, lambda: validate(rows)),
    }


def main() -> int:
    """Measure, print, compare with the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = measure()
    for name, value in found.items():
        print(f"{name}: {value:.4g}" + (" s" if name in LIMITS_S else ""))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine(), "figures": found}, indent=1) + "\n", encoding="utf-8")
    return int(any(found[name] > limit for name, limit in LIMITS_S.items()))


if __name__ == "__main__":
    sys.exit(main())
