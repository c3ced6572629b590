"""A whole run of a spec on GPUs, and its figures beside the plan's, in one file.

    python -m benchmarks.engines.end_to_end specs/gpu_grpo_0_6b_colocated.yaml OUT.json [--run-dir DIR] [--set path=value ...]

With --run-dir of a run that is over, only its figures are gathered.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import machine
from miles_plan.backends.executor.engine_checks import installed_release
from miles_plan.backends.executor.machine_checks import gpu_names
from miles_plan.backends.known_versions import NEEDS
from miles_plan.report.measured import measured, to_json
from miles_plan.report.run_files import RunRecord, read_run
from miles_plan.report.start import engine_texts, start_text

EVENTS = ("cluster_started", "start_step", "actors_started", "checkpoint_loaded", "weights_acknowledged", "warning")
SYNC_TASKS = ("weight_sync", "wake_weights", "wake_cache", "sleep_rollout", "offload_train", "onload_train")


def figures(record: RunRecord) -> dict[str, Any]:
    """What the run was for: reward, log-prob difference, throughput, how much of a step moving weights and states takes."""
    steps = [row for row in record.metrics if row["loop"] == record.plan.graph.loops[-1].name]
    later = steps[1:] or steps  # the first compiles kernels
    spans = [(run.task, run.took_s) for run in record.runs if run.loop == record.plan.graph.loops[-1].name and run.iteration]
    moving_s = sum(took for task, took in spans if task in SYNC_TASKS) / max(1, len(later))
    begins = {run.iteration: run.start_s for run in record.runs if run.task == "rollout"}
    step_s = [later_s - begins[at - 1] for at, later_s in sorted(begins.items()) if at - 1 in begins and at > 1]
    median_step_s = median(step_s) if step_s else None
    return {
        "steps": len(steps),
        "reward": [row.get("reward_mean") for row in steps],
        "max_abs_log_prob_diff": [row.get("max_abs_log_prob_diff") for row in steps],
        "mean_abs_log_prob_diff": [row.get("mean_abs_log_prob_diff") for row in steps],
        "tokens": [row.get("tokens") for row in steps],
        "step_s": median_step_s,
        "tokens_per_s": median(row["tokens"] for row in later) / median_step_s if median_step_s else None,
        "moving_s": moving_s,
        "moving_share_of_step": moving_s / median_step_s if median_step_s else None,
        "rollout_s_in_sglang_over_ours": _shares(record, steps),
    }


def _shares(record: RunRecord, steps: list[Any]) -> list[float]:
    """Of every rollout's time, the part that SGLang's own `generate` took: the rest is our way there and back."""
    took = {run.iteration: run.took_s for run in record.runs if run.task == "rollout"}
    rows = [row for row in steps if row.get("generating_s") and row["iteration"] in took]
    return [round(row["generating_s"] / took[row["iteration"]], 4) for row in rows]


def gather(run_dir: Path, settings: list[str]) -> dict[str, Any]:
    """All of it, with what it was measured on."""
    record = read_run(run_dir)
    packages = dict.fromkeys(package.name for needs in NEEDS.values() for package in needs)
    return {
        "spec": record.plan.name,
        "settings": settings,
        "machine": machine(),
        "gpus": gpu_names(),
        "versions": {name: release for name in packages if (release := installed_release(name))},
        "summary": dict(record.summary),
        "figures": figures(record),
        "planned_against_measured": to_json(measured(record)),
        "start": [start_text(record), *engine_texts(record)],
        "events": [row for row in record.events if row["kind"] in EVENTS][:60],
    }


def main() -> int:
    """Run, gather, write; the exit code is the run's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec")
    parser.add_argument("out", type=Path)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="PATH=VALUE")
    args = parser.parse_args()
    run_dir, code = args.run_dir or Path(tempfile.mkdtemp()) / "run", 0
    if not (run_dir / "plan.json").exists():
        settings = [part for each in args.settings for part in ("--set", each)]
        command = [sys.executable, "-m", "miles_plan", "run", args.spec, "--run-dir", str(run_dir), *settings]
        code = subprocess.run(command, check=False).returncode
    args.out.write_text(json.dumps(gather(run_dir, args.settings), indent=1) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
