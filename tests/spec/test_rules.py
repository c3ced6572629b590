from __future__ import annotations

from pathlib import Path

import pytest

from miles_plan.diagnostics import PlanError
from miles_plan.spec import load_job
from miles_plan.spec.fields import all_fields
from miles_plan.spec.rules import RULES
from tests.spec.example import write

TEACHER = "algorithm.teacher.model.name=qwen3-8b"
BROKEN = [
    (["model.hf_config=c.json"], "MP130", "model.hf_config"),
    (["model.name=null"], "MP130", "model"),
    (
        ["algorithm.kind=distillation", TEACHER, "algorithm.teacher.model.checkpoint=x"],
        "MP130",
        "algorithm.teacher.model.checkpoint",
    ),
    (["model.tokenizer={}"], "MP130", "model.tokenizer"),
    (["model.tokenizer={characters: ab, path: t}"], "MP130", "model.tokenizer"),
    (["model.tokenizer.characters=abca"], "MP123", "model.tokenizer.characters"),
    (["cluster.groups=[{gpu: h100}]"], "MP130", "cluster"),
    (["cluster.gpu=null", "cluster.groups=[{gpu: h100}]"], "MP131", "cluster.nodes"),
    (["algorithm.clip_high=0.1"], "MP132", "algorithm.clip_high"),
    (["algorithm.dual_clip=0.5"], "MP123", "algorithm.dual_clip"),
    (["algorithm.kl_loss_coef=0.1", "algorithm.kl_reward_coef=0.1"], "MP131", "algorithm.kl_reward_coef"),
    (["algorithm.critic={}"], "MP133", "algorithm.critic"),
    (["algorithm.kind=distillation"], "MP133", "algorithm.kind"),
    ([TEACHER], "MP133", "algorithm.teacher"),
    (["algorithm.updates_per_rollout=3"], "MP134", "algorithm.updates_per_rollout"),
    (["rollout.samples_per_prompt=1"], "MP150", "rollout.samples_per_prompt"),
    (["algorithm.kind=sft"], "MP134", "rollout.samples_per_prompt"),
    (
        ["algorithm.kind=ppo", "rollout.samples_per_prompt=1", "rollout.dynamic_sampling.enabled=true"],
        "MP150",
        "rollout.dynamic_sampling.enabled",
    ),
    (["rollout.response_tokens.mean=8100"], "MP132", "rollout.response_tokens.mean"),
    (["rollout.response_tokens.p99=9000"], "MP132", "rollout.response_tokens.p99"),
    (["rollout.response_tokens.p99=auto", "rollout.response_tokens.mean=9000"], "MP132", "rollout.response_tokens.mean"),
    (["rollout.response_tokens={max: 9, mean: 3, p99: auto, histogram: h}"], "MP131", "rollout.response_tokens.mean"),
    (["rollout.prompt_tokens={mean: 9, max: 8}"], "MP132", "rollout.prompt_tokens.mean"),
    (["rollout.prompt_tokens={max: 80}", "data.max_prompt_tokens=70"], "MP132", "rollout.prompt_tokens.max"),
    (["rollout.speculative={method: mtp, steps: 3, draft_tokens: 8}"], "MP132", "rollout.speculative.draft_tokens"),
    (["train.optimizer.warmup_steps=101"], "MP132", "train.optimizer.warmup_steps"),
    (["train.optimizer.min_lr=0.1"], "MP132", "train.optimizer.min_lr"),
    (["warm_start={data: d, steps: 5, batch_size: 1, warmup_steps: 6}"], "MP132", "warm_start.warmup_steps"),
    (["warm_start={data: d, steps: 5, batch_size: 1, min_lr: 1}"], "MP132", "warm_start.min_lr"),
    (["train.layout.vpp=2"], "MP132", "train.layout.vpp"),
    (["train.layout={pp: 2, stage_layers: [1, 2, 3]}"], "MP132", "train.layout.stage_layers"),
    (["train.layout={dp: 2, tp: 2, ep: 8}"], "MP132", "train.layout.ep"),
    (["rollout.layout={tp: 4, ep: 3}"], "MP132", "rollout.layout.ep"),
    (["rollout.layout={tp: 4, dp_attention: 8}"], "MP132", "rollout.layout.dp_attention"),
    (["data.reward=null"], "MP133", "data.reward"),
    (["evaluation.every_steps=5"], "MP133", "evaluation.every_steps"),
    (["schedule.max_staleness=1"], "MP131", "schedule.max_staleness"),
    (["train.optimizer.moments=bf16"], "MP131", "train.optimizer.moments"),
    (["train.optimizer.offload=off", "train.optimizer.offload_fraction=0.5"], "MP131", "train.optimizer.offload_fraction"),
    (["train.engine=torch", 'train.release="26.06"'], "MP131", "train.release"),
    (["train.engine=fsdp2", "train.gradients=bf16"], "MP131", "train.gradients"),
    (["train.engine=fsdp2", "train.optimizer.precision_aware=true"], "MP131", "train.optimizer.precision_aware"),
    (["schedule={mode: asynchronous, max_staleness: 0}"], "MP131", "schedule.max_staleness"),
    (["schedule.mode=one_step_off", "placement=colocate"], "MP131", "schedule.mode"),
]


@pytest.mark.parametrize(("sets", "code", "field"), BROKEN, ids=lambda each: str(each) if isinstance(each, str) else "")
def test_a_broken_rule_is_the_only_finding(sets: list[str], code: str, field: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        load_job(write(tmp_path), sets)
    assert [(each.code, each.field) for each in caught.value.diagnostics] == [(code, field)]


@pytest.mark.parametrize(
    "sets",
    [
        ["algorithm.kind=sft", "rollout.samples_per_prompt=1", "data.reward=null"],
        ["algorithm.kind=distillation", TEACHER, "data.reward=null", "rollout.samples_per_prompt=1"],
        ["algorithm.kind=ppo", "algorithm.critic={lr: 1e-5, warmup_steps: 5}", "rollout.samples_per_prompt=1"],
        ["algorithm.kl_loss_coef=0.1"],
        ["algorithm.clip_high=0.2"],
        ["algorithm.dual_clip=3"],
        ["algorithm.updates_per_rollout=4", "train.optimizer.warmup_steps=400"],
        ["schedule={mode: asynchronous, max_staleness: 4}", "placement=disaggregate"],
        ["schedule={mode: one_step_off}", "placement.rollout_gpus=8"],
        ["schedule={mode: synchronous, max_staleness: 0}"],
        ["train.layout={tp: 4, pp: 2, vpp: 2, stage_layers: [12, 12, 12, 12]}"],
        ["train.layout={tp: 2, dp: 4, ep: 8}"],
        ["rollout.layout={tp: 8, ep: 4, dp_attention: 2}"],
        ["rollout.response_tokens={max: 9, mean: auto, p99: auto, histogram: h}"],
        ["rollout.speculative={method: eagle, steps: 3, topk: 2, draft_tokens: 8}"],
        ["rollout.speculative={method: eagle, steps: 3, draft_tokens: 4}"],
        ["evaluation={every_steps: 5, prompts: e.jsonl}"],
        ["warm_start={data: {generator: arithmetic}, steps: 5, batch_size: 1, lr: 1e-3}"],
        ["model.tokenizer={characters: abc}"],
    ],
    ids=str,
)
def test_what_the_rules_allow(sets: list[str], tmp_path: Path) -> None:
    load_job(write(tmp_path), sets)


def test_every_rule_is_broken_once_and_looks_at_fields_that_exist() -> None:
    assert {path for rule in RULES for path in rule.needs} <= set(all_fields())
    assert len(BROKEN) >= len(RULES)
