"""What trainers say of a plan before anything starts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from miles_plan.backends.engine import EngineError
from miles_plan.backends.fsdp_engine import requirements as fsdp
from miles_plan.backends.megatron_engine import requirements as megatron
from miles_plan.backends.megatron_engine.versions import require_megatron
from miles_plan.backends.training.from_plan import trainer_facts
from miles_plan.ir.layout import TrainLayout
from miles_plan.ir.plan import Decision, Plan
from tests.backends.executor.tiny_plans import tiny_plan


def texts(module: object, plan: Plan) -> list[str]:
    group = next(group for group in plan.graph.groups if group.role == "train")
    found = list(module.problems(plan, group))  # type: ignore[attr-defined]
    assert {each.code for each in found} <= {"MP444"}
    return [each.message for each in found]


def test_facts_come_from_the_whole_plan():
    plan = tiny_plan(train=TrainLayout(dp=2), reference=True)
    facts = trainer_facts(plan, next(group for group in plan.graph.groups if group.role == "train"))
    assert facts.layout == TrainLayout(dp=2)
    assert facts.keep_reference
    assert facts.device == "cpu"
    assert not facts.exact
    assert facts.dtype == "float32"


def test_a_missing_package_is_named_with_what_works(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert any(
        "megatron-core is not installed; known to work: megatron-core 0.19.2" in each for each in texts(megatron, tiny_plan())
    )
    with pytest.raises(EngineError, match=r"transformer-engine 2\.13\.0|megatron-core 0\.19\.2"):
        require_megatron(transformer_engine=True)


def test_determinism_of_transformer_engine_is_a_setting_of_the_environment(monkeypatch):
    monkeypatch.setattr("miles_plan.backends.megatron_engine.versions.installed", lambda package: "1.0")
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", raising=False)
    with pytest.raises(EngineError, match="NVTE_ALLOW_NONDETERMINISTIC_ALGO=0"):
        require_megatron(transformer_engine=True, deterministic=True)
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    require_megatron(transformer_engine=True, deterministic=True)


def test_layouts_are_checked_against_the_model():
    plan = tiny_plan(train=TrainLayout(tp=2, dp=2))
    assert any("tp=2 without sequence_parallel for a mixture of experts" in each for each in texts(megatron, plan))
    assert any("tp=2 (allowed: 1; it shards over dp)" in each for each in texts(fsdp, plan))
    assert not texts(fsdp, tiny_plan(train=TrainLayout(dp=2)))


def test_precisions_and_promises_that_cannot_be_kept_are_said():
    plan = tiny_plan()
    plan = replace(plan, run=replace(plan.run, train_dtype="nvfp4"))
    assert any("it cannot train in nvfp4" in each for each in texts(megatron, plan))
    exact = replace(plan, decisions=(Decision(field="precision.alignment", value="exact", reason="", by=""),))
    assert any("alignment: exact" in each for each in texts(fsdp, exact))
    eight = replace(exact, run=replace(exact.run, train_dtype="fp8_blockwise"))
    assert any("our kernels train in bf16" in each for each in texts(megatron, eight))
