"""The memory plans of runs against what their GPUs and processes held on H200s (`python -m benchmarks.engines`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles_plan.passes.compile import compile_job
from miles_plan.spec import load_job

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
RUNS = {
    "1.7B": ("gpu_grpo_1_7b_long_responses", "engines_long_off.json"),
    "1.7B exact": ("gpu_grpo_1_7b_long_responses", "engines_long_exact.json"),
    "mixture of experts exact": ("gpu_grpo_moe_exact", "engines_moe_exact.json"),
}


def read(name: str) -> Any:
    return json.loads((ROOT / "benchmarks/results" / name).read_text(encoding="utf-8"))


def planned(name: str) -> dict[str, Any]:
    """The phases of the GPU, by name, of a run's plan today."""
    spec, results = RUNS[name]
    plan = compile_job(load_job(ROOT / f"specs/{spec}.yaml", read(results)["settings"])).plan
    return {phase.name: phase for timeline in plan.graph.memory if timeline.place == "gpu" for phase in timeline.phases}


@pytest.mark.parametrize("name", RUNS)
def test_every_phase_is_planned_within_three_percent_of_its_peak(name: str) -> None:
    phases = planned(name)
    rows = read(RUNS[name][1])["planned_against_measured"]["memory"]
    assert {row["phase"] for row in rows} == {"generate", "log-probs", "train", "sync"}
    for row in rows:
        assert phases[row["phase"]].total_bytes == pytest.approx(row["measured_bytes"], rel=0.03), row["phase"]


@pytest.mark.parametrize("name", ["1.7B", "1.7B exact"])
def test_what_sleeps_is_planned_as_it_was_measured(name: str) -> None:
    apart, phases = read("process_memory_h200.json")["mib"][name], planned(name)
    trainer = next(term for term in phases["generate"].terms if term.name == "asleep")
    engine = next(term for term in phases["train"].terms if term.name == "asleep")
    assert trainer.size_bytes == pytest.approx(apart["trainer asleep, after its first step"] * MIB, rel=0.03)
    assert engine.size_bytes == pytest.approx(apart["engine asleep"] * MIB, rel=0.1)
