"""Where a trainer's step and log-prob pass spend the GPU's time, by kernel, on Megatron's layers and on this package's.

    python -m benchmarks.engines.step_profile OUT.json [--trainers megatron invariant] [--layers 28]

Qwen3-1.7B's shape with random weights, three micro-batches of 32 sequences of 512 tokens, of which 497 are responses: what
`long` and `long_exact` of `benchmarks.engines` train on. Times are of a third step and a third pass, without and then with the
profiler; a kernel's share is of the GPU's busy time. Peaks are of all that the process holds.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.engines.trainer_memory import TRAINERS, batch_of
from benchmarks.engines.trainers_on_gpus import ADAM, DENSE, MODELS, WORK, Case, build, old_log_probs, timed
from benchmarks.machine import machine
from miles_plan.ir.options import LossOptions

MODEL = "dense 1.7b"
TOKENS, LENGTH, SCORED = 16384, 512, 497
MICRO_BATCHES = 3
WARM = 2
NAME_CHARACTERS = 90


def profiled(run: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Milliseconds and launches of each kernel, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as of:
        run()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in of.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name[:NAME_CHARACTERS]
            spent[name] += event.device_time
            launches[name] += 1
    return {name: {"ms": us / 1e3, "launches": launches[name]} for name, us in spent.most_common()}


def measure(name: str) -> dict[str, Any]:
    """One trainer, built once: times and kernels of both."""
    import torch

    case = Case(name, MODEL, **TRAINERS[name])
    engine = build(replace(case, options={"micro_batch_tokens": TOKENS, **case.options}), 0, None)
    found: dict[str, Any] = {"trainer": name}
    try:
        for what, run in runs_of(engine).items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            for _ in range(WARM + 1):
                with timed(found, f"{what}_s"):
                    run()
            found[f"{what}_peak_bytes"] = torch.cuda.max_memory_allocated()
            found[f"{what}_reserved_bytes"] = torch.cuda.max_memory_reserved()
            found[what] = profiled(run)
    finally:
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    return found


def runs_of(engine: Any) -> dict[str, Callable[[], object]]:
    """The pass and the step."""
    batch = batch_of(MODEL, MICRO_BATCHES * TOKENS, SCORED, length=LENGTH)
    scored = engine.log_probs(batch, model="policy", temperature=1.0, replay_routing=False)
    batch = batch.with_columns(old_log_probs=old_log_probs(batch, scored, engine))
    loss = LossOptions(kind="policy_gradient")
    return {
        "step": lambda: engine.train_step(batch, loss=loss, optimizer=ADAM, replay_routing=False),
        "log_probs": lambda: engine.log_probs(batch, model="policy", temperature=1.0, replay_routing=False),
    }


def show(found: dict[str, Any], most: int) -> None:
    """A table of each kind of run."""
    for what in ("log_probs", "step"):
        busy_ms = sum(each["ms"] for each in found[what].values())
        peak, reserved = (found[f"{what}_{kind}_bytes"] / 2**30 for kind in ("peak", "reserved"))
        held = f"{peak:.2f} GiB allocated, {reserved:.2f} reserved"
        print(f"{found['trainer']} {what}: {found[f'{what}_s'] * 1e3:.0f} ms, kernels {busy_ms:.0f} ms, {held}")
        for name, each in list(found[what].items())[:most]:
            print(f"  {each['ms']:8.1f} ms {each['launches']:6.0f}x {name}")
    sys.stdout.flush()


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainers", nargs="+", default=["megatron", "invariant"], choices=list(TRAINERS))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--most", type=int, default=28, help="kernels to print")
    asked = parser.parse_args()
    MODELS[MODEL] = {**DENSE, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": asked.layers}
    WORK.mkdir(exist_ok=True)
    found = []
    for name in asked.trainers:
        found.append(measure(name))
        show(found[-1], asked.most)
        asked.out.write_text(json.dumps({"machine": machine(), "trainers": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
