"""A profile named by a spec or by --profile prices the plan, and the plan says so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from miles_plan.catalog.gpus import find_gpu
from miles_plan.cost.profile import profile_for
from miles_plan.diagnostics import PlanError
from miles_plan.ir.plan import Plan, from_json, to_json
from miles_plan.passes.compile import compile_job
from miles_plan.spec import load_job

SPEC = """\
version: 1
name: priced
model: {name: qwen3-8b}
cluster: %s
algorithm: {kind: grpo}
data: {prompts: {generator: arithmetic}, reward: math}
rollout:
  prompts_per_step: 64
  samples_per_prompt: 8
  response_tokens: {max: 8192, mean: 3000, p99: 8000}
  engine: sglang
  layout: {tp: 1}
train: {engine: megatron, layout: {tp: 2, pp: 1, cp: 1}, tokens_per_gpu: 16384, recompute: none}
placement: colocate
"""


def plan_of(folder: Path, cluster: str, *sets: str) -> Plan:
    path = folder / "job.yaml"
    path.write_text(SPEC % cluster)
    return compile_job(load_job(str(path), list(sets))).plan


def write(path: Path, gpu: str = "h200", **constants: Any) -> Path:
    path.write_text(json.dumps({"schema": 1, "gpu": gpu, "date": "2026-11-21", **constants}))
    return path


def step(plan: Plan, task: str) -> float:
    found = plan.graph.task(task).estimate
    assert found is not None
    return found.mid_s


def test_half_the_rate_of_products_makes_the_training_step_slower(tmp_path: Path) -> None:
    reached = profile_for(find_gpu("h200")).gemm_fraction["bf16"]
    write(tmp_path / "half.json", gemm_fraction={"bf16": reached / 2})
    shipped = plan_of(tmp_path, "{gpu: h200}")
    half = plan_of(tmp_path, "{gpu: h200, profile: half.json}")
    assert step(half, "train") / step(shipped, "train") == pytest.approx(1.8, abs=0.2)
    assert step(half, "rollout") == pytest.approx(step(shipped, "rollout"), rel=0.01)


def test_memory_outside_the_allocator_is_the_profiles(tmp_path: Path) -> None:
    write(tmp_path / "heavy.json", context_bytes=5e9)
    shipped, heavy = plan_of(tmp_path, "{gpu: h200}"), plan_of(tmp_path, "{gpu: h200, profile: heavy.json}")

    def context(plan: Plan, name: str) -> float:
        terms = (term for timeline in plan.graph.memory for phase in timeline.phases for term in phase.terms)
        return max(term.size_bytes for term in terms if term.name == name)

    for name in ("cuda context", "context and communicators"):  # the trainer's, and the engine's
        assert context(heavy, name) > context(shipped, name) + 4e9


def test_the_plan_says_what_it_was_priced_with(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json", gemm_fraction={"bf16": 0.6}, hbm_fraction=0.8)
    plan = plan_of(tmp_path, "{gpu: h200, profile: mine.json}")
    assert (str(path), hashlib.sha256(path.read_bytes()).hexdigest()) in plan.sources
    decision = plan.decision("cluster.profile")
    assert decision is not None
    measured, shipped = decision.reason.split("; from the shipped profile")
    assert "gemm_fraction.bf16, hbm_fraction" in measured
    assert "decode_ops.attention" in shipped
    assert "gemm_fraction.bf16" not in shipped
    assert from_json(to_json(plan)) == plan


def test_another_file_makes_another_plan(tmp_path: Path) -> None:
    write(tmp_path / "mine.json", hbm_fraction=0.8)
    before = to_json(plan_of(tmp_path, "{gpu: h200, profile: mine.json}"))["plan_sha256"]
    write(tmp_path / "mine.json", hbm_fraction=0.7)
    assert to_json(plan_of(tmp_path, "{gpu: h200, profile: mine.json}"))["plan_sha256"] != before


def test_without_a_profile_the_plan_names_none(tmp_path: Path) -> None:
    assert plan_of(tmp_path, "{gpu: h200}").decision("cluster.profile") is None


def test_the_field_is_read(tmp_path: Path) -> None:
    write(tmp_path / "mine.json", hbm_fraction=0.8)
    assert plan_of(tmp_path, "{gpu: h200, profile: mine.json}").unread_fields == ()


def test_groups_of_one_gpu_share_its_profile(tmp_path: Path) -> None:
    write(tmp_path / "mine.json", hbm_fraction=0.8)
    cluster = "{groups: [{gpu: h200, profile: mine.json}, {gpu: h200}]}"
    assert plan_of(tmp_path, cluster).decision("cluster.profile") is not None


@pytest.mark.parametrize(
    ("cluster", "why"),
    [
        ("{gpu: b200, profile: h200.json}", "is a profile of h200, the cluster has b200"),
        ("{gpu: h200, profile: text.json}", "is not JSON"),
        ("{gpu: h200, profile: wild.json}", "is a fraction of the datasheet's figure"),
        ("{groups: [{gpu: h200, profile: h200.json}, {gpu: h200, profile: other.json}]}", "two profiles for h200"),
    ],
)
def test_a_profile_that_cannot_be_used_is_placed(tmp_path: Path, cluster: str, why: str) -> None:
    write(tmp_path / "h200.json", hbm_fraction=0.8)
    write(tmp_path / "other.json", hbm_fraction=0.7)
    write(tmp_path / "wild.json", hbm_fraction=80)
    (tmp_path / "text.json").write_text("bandwidth: good")
    with pytest.raises(PlanError) as refused:
        plan_of(tmp_path, cluster)
    (found,) = refused.value.diagnostics
    assert found.code == "MP145"
    assert why in found.message
    assert found.location is not None
    assert found.location.line == 4


def test_the_option_says_the_same_as_the_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from miles_plan.cli.app import app

    write(tmp_path / "my profile.json", gemm_fraction={"bf16": 0.35})
    (tmp_path / "job.yaml").write_text(SPEC % "{gpu: h200}")
    monkeypatch.chdir(tmp_path)

    def figures(*arguments: str) -> dict[str, float]:
        done = CliRunner().invoke(app, ["estimate", "job.yaml", "--json", *arguments])
        assert done.exit_code == 0, done.output
        return {each["name"]: each["mid"] for each in json.loads(done.stdout)["estimates"]}

    shipped, given = figures(), figures("--profile", "my profile.json")
    assert given != shipped
    assert given == figures("--set", 'cluster.profile="my profile.json"')
