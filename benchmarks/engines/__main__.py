"""The real engines, one case after another, each under its own time limit, one result file a case.

    python -m benchmarks.engines OUT_FOLDER [case ...] [--run-dir FOLDER] [--set path=value ...] [--beside-others]

A case that fails or runs out of time leaves its log and what was gathered so far; the others go on. The exit code says whether
all went well. Cases that need more GPUs than there are, are left out by name.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.engines.end_to_end import gather
from miles_plan.backends.executor.device_memory import visible_gpus

NO_SAVES = ("checkpoint.every_steps=1000",)
SHORT = ("warm_start.steps=40", "algorithm.steps=8", *NO_SAVES)
LEARNING = ("warm_start.steps=300", "algorithm.steps=50", *NO_SAVES)
FEW_LONG = (
    "algorithm.steps=4", "train.tokens_per_gpu=16384", *NO_SAVES,
    *(f"rollout.response_tokens.{each}=512" for each in ("max", "mean", "p99")),
)  # fmt: skip
EXACT_ENVIRONMENT = {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}


@dataclass(frozen=True, slots=True)
class Case:
    """A spec with settings. limit_s: the start of the engines (two minutes beside other starts) and the run."""

    spec: str
    settings: tuple[str, ...]
    limit_s: float
    gpus: int = 1
    exact: bool = False


CASES = {
    "colocated": Case("gpu_grpo_0_6b_colocated", SHORT, 220),
    "off": Case("gpu_grpo_0_6b_colocated", ("precision.alignment=off", *LEARNING), 330),
    "exact": Case("gpu_grpo_0_6b_exact", LEARNING, 360, exact=True),
    "disaggregated": Case("gpu_grpo_0_6b_disaggregated", SHORT, 220, gpus=2),
    "fsdp2": Case("gpu_grpo_0_6b_fsdp2", SHORT, 240),
    "larger": Case("gpu_grpo_1_7b_colocated", SHORT, 260),
    "long": Case("gpu_grpo_1_7b_long_responses", ("precision.alignment=off", *FEW_LONG), 330),
    "long_exact": Case("gpu_grpo_1_7b_long_responses", ("precision.alignment=exact", *FEW_LONG), 330, exact=True),
    "moe": Case("gpu_grpo_moe_replay", SHORT, 300),
    "moe_exact": Case("gpu_grpo_moe_exact", ("warm_start.steps=40", "algorithm.steps=50", *NO_SAVES), 420, exact=True),
    "exact_tp": Case("gpu_grpo_0_6b_exact_rollout_tp1_train_tp2", LEARNING, 420, gpus=2, exact=True),
    "four": Case("gpu_grpo_0_6b_4_gpus", SHORT, 240, gpus=4),
}
BRINGUP = "bringup"


def run_case(name: str, case: Case, out: Path, folder: Path, *, beside_others: bool) -> bool:
    """One run; returns whether it ended well within its limit.

    beside_others: its GPUs have other work, so that their memory says nothing of the run, and its times are upper bounds.
    """
    run_dir = folder / name
    shutil.rmtree(run_dir, ignore_errors=True)
    settings = [part for each in case.settings for part in ("--set", each)]
    command = [sys.executable, "-m", "miles_plan", "run", f"specs/{case.spec}.yaml", "--run-dir", str(run_dir), *settings]
    environment = {**os.environ, **(EXACT_ENVIRONMENT if case.exact else {})}
    done = _within(command, case.limit_s, out / f"{name}.log", environment)
    if (run_dir / "plan.json").exists():
        result = gather(run_dir, list(case.settings))
        if beside_others:
            result = {"beside_others": True, **result}
            result["planned_against_measured"]["memory"] = []
        (out / f"engines_{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if (run_dir / "logs").is_dir():
            shutil.make_archive(str(out / f"{name}_logs"), "xztar", run_dir / "logs")
    return done


def bring_up(out: Path, folder: Path) -> bool:
    """One engine alone: speed against SGLang's own loop, sleep, death."""
    plan = folder / "bringup-plan.json"
    compiling = [sys.executable, "-m", "miles_plan", "compile", "specs/gpu_grpo_0_6b_colocated.yaml", "-o", str(plan)]
    subprocess.run(compiling, check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-m", "benchmarks.engines.sglang_bringup", str(plan), str(out / "sglang_bringup.json")]
    command += ["--model", str(folder / "model"), "--log", str(out / "bringup_sglang.log")]
    return _within(command, 200.0, out / "bringup.log", dict(os.environ))


def _within(command: list[str], limit_s: float, log: Path, environment: dict[str, str]) -> bool:
    """Run a command; past its limit it is asked to end, which for a run means to save and leave, and then made to."""
    began = time.perf_counter()
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        for wait_s, then in ((limit_s, signal.SIGINT), (20.0, signal.SIGINT), (10.0, signal.SIGKILL)):
            try:
                process.wait(wait_s)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(then)
        code = process.wait()
    print(f"{log.stem:<16} exit {code:>4}  {time.perf_counter() - began:6.1f} s", flush=True)
    return code == 0


def main() -> int:
    """All cases that were asked for, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join((BRINGUP, *CASES))}; by default all")
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="PATH=VALUE", help="in every case's spec"
    )
    parser.add_argument(
        "--beside-others", action="store_true", help="the GPUs have other work: times bound, memory says nothing"
    )
    parser.add_argument("--run-dir", type=Path, help="where runs are written; a folder in memory makes checkpoints quick")
    args = parser.parse_args()
    names = args.cases or [BRINGUP, *CASES]
    if unknown := [name for name in names if name not in (BRINGUP, *CASES)]:
        parser.error(f"no case {', '.join(unknown)}")
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.run_dir or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    gpus, good = len(visible_gpus()), True
    for name in names:
        if name == BRINGUP:
            good &= bring_up(args.out, folder)
        elif CASES[name].gpus > gpus:
            print(f"{name:<16} left out: needs {CASES[name].gpus} GPUs, {gpus} here", flush=True)
        else:
            case = replace(CASES[name], settings=(*CASES[name].settings, *args.settings))
            good &= run_case(name, case, args.out, folder, beside_others=args.beside_others)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
