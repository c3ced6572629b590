"""How long the search takes: 64 GPUs in this process and as a whole command, and 10,240 GPUs with a 1T-parameter model.

python -m benchmarks.bench_search [--json] [--out benchmarks/results/search_cpu.json]

Prints wall seconds, and CPU seconds beside them: on a machine that others use too the first grow and the second do not. Exits
with 1 if a wall time or the memory misses its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from miles_plan.passes import rollout_choices
from miles_plan.passes.compile import context_of
from miles_plan.passes.joint_search import search_jointly
from miles_plan.passes.workload import step_workload
from miles_plan.spec import job_from_mapping

REPEATS = 5
GIB = 1 << 30
LIMITS = {"64 GPUs, search": 1.0, "64 GPUs, cold process": 2.0, "10,240 GPUs, search": 10.0, "10,240 GPUs, peak memory": 2.0}
JOBS: Mapping[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {"nodes": 8, "prompts": 256, "samples": 8, "tokens": {"max": 8192, "mean": 3500.0, "p99": 8000.0}},
    "qwen3-235b-a22b": {"nodes": 8, "prompts": 128, "samples": 16, "tokens": {"max": 16384, "mean": 5000.0, "p99": 15000.0}},
    "kimi-k2": {"nodes": 1280, "prompts": 4096, "samples": 16, "tokens": {"max": 16384, "mean": 5000.0, "p99": 15000.0}},
}


def job(model: str) -> dict[str, Any]:
    """A GRPO job with everything left to the search."""
    size = JOBS[model]
    return {
        "version": 1,
        "name": "bench-search",
        "model": {"name": model},
        "cluster": {"gpu": "h200", "nodes": size["nodes"]},
        "algorithm": {"kind": "grpo"},
        "data": {"prompts": {"generator": "arithmetic"}, "reward": "math"},
        "rollout": {
            "prompts_per_step": size["prompts"],
            "samples_per_prompt": size["samples"],
            "response_tokens": size["tokens"],
        },
    }


def searched(model: str) -> dict[str, float]:
    """Wall and CPU seconds of one search with nothing cached from the one before, and what it found."""
    ctx, _ = context_of(job_from_mapping(job(model)))
    workload = step_workload(ctx)
    rollout_choices.forget_simulations()
    wall, cpu = time.perf_counter(), time.process_time()
    found = search_jointly(ctx, workload)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "front": float(len(found.front)),
        "rows_timed": float(found.rows_timed),
        "pairs_priced": float(found.pairs_priced),
        "step_s": found.front[0].step_s,
    }


def in_process(model: str) -> dict[str, float]:
    """Medians of several searches."""
    runs = [searched(model) for _ in range(REPEATS)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def cold(model: str, directory: Path) -> dict[str, float]:
    """`miles-plan compile` from process start to exit, median of several."""
    spec = directory / f"{model}.yaml"
    spec.write_text(json.dumps(job(model)), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "miles_plan", "compile", str(spec), "-o", str(directory / "plan.json")]
    walls, cpus = [], []
    for _ in range(REPEATS):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        walls.append(time.perf_counter() - start)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"wall_s": statistics.median(walls), "cpu_s": statistics.median(cpus)}


def alone(model: str) -> dict[str, float]:
    """One search in a process of its own, with the most memory that process held."""
    command = [sys.executable, "-m", "benchmarks.bench_search", "--only", model]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure() -> dict[str, dict[str, float]]:
    """Every figure by what was searched."""
    with tempfile.TemporaryDirectory() as name:
        return {
            **{f"64 GPUs, {model}": in_process(model) for model in ("qwen3-30b-a3b", "qwen3-235b-a22b")},
            **{f"64 GPUs, {model}, cold process": cold(model, Path(name)) for model in ("qwen3-30b-a3b", "qwen3-235b-a22b")},
            "10,240 GPUs, kimi-k2": alone("kimi-k2"),
        }


def missed(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Limits that were not kept."""
    large = found["10,240 GPUs, kimi-k2"]
    worst = {
        "64 GPUs, search": max(found[f"64 GPUs, {model}"]["wall_s"] for model in ("qwen3-30b-a3b", "qwen3-235b-a22b")),
        "64 GPUs, cold process": max(
            found[f"64 GPUs, {model}, cold process"]["wall_s"] for model in ("qwen3-30b-a3b", "qwen3-235b-a22b")
        ),
        "10,240 GPUs, search": large["wall_s"],
        "10,240 GPUs, peak memory": large["peak_gib"],
    }
    return [f"{name}: {value:.3g}, the limit is {LIMITS[name]:g}" for name, value in worst.items() if value > LIMITS[name]]


def main() -> int:
    """Measure, print, compare with the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        figures = searched(args.only)
        peak = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps(figures | {"peak_gib": peak.ru_maxrss * 1024 / GIB}))
        return 0
    found = measure()
    record = {"machine": machine(), "load_average": os.getloadavg()[0], "limits": LIMITS, "figures": found}
    if args.json:
        print(json.dumps(record, indent=1))
    else:
        for name, figures in found.items():
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    failures = missed(found)
    for failure in failures:
        print(f"missed: {failure}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
