"""Fields that reach the estimates: each moves the figure that it is about."""

from __future__ import annotations

from typing import Any

import pytest

from miles_plan.cost.interval import Interval
from miles_plan.cost.train_memory import train_memory
from miles_plan.cost.train_options import TrainMemoryOptions
from miles_plan.cost.train_time import train_step_time
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.passes.compile import compile_job
from miles_plan.passes.rollout_choices import rollout_memory_options
from miles_plan.passes.sync_price import sync_price
from miles_plan.passes.train_choices import TrainChoice, memory_options, time_options, train_workload
from miles_plan.passes.workload import step_workload
from miles_plan.spec import job_from_mapping
from tests.passes.contexts import context

LAYOUT = TrainLayout(tp=2, dp=2, sequence_parallel=True)
EAGLE = {"method": "eagle", "train": True}


BYTES_AND_SECONDS = ("step_s", "log_prob_s", "peak_bytes", "static_bytes", "asleep_bytes", "host_bytes")


def choice(**changes: Any) -> TrainChoice:
    sizes: dict[str, Any] = dict.fromkeys(
        ("step_s", "log_prob_s", "peak_bytes", "static_bytes", "asleep_bytes", "host_bytes"), 0.0
    )
    plain = {"layout": LAYOUT, "recompute": "none", "tokens_per_gpu": 8192, "optimizer_offload": False}
    return TrainChoice(**(sizes | plain | changes))


def options(chosen: TrainChoice | None = None, **sections: Any) -> TrainMemoryOptions:
    ctx = context(**sections)
    return memory_options(ctx, step_workload(ctx), chosen or choice(), microbatches=4)


def step(**sections: Any) -> Interval:
    ctx = context(**sections)
    batch = train_workload(ctx, step_workload(ctx), 8192)
    return train_step_time(ctx.model, LAYOUT, batch, ctx.cluster, time_options(ctx, choice()))


def drafting(**speculative: Any) -> dict[str, Any]:
    rollout = {
        "prompts_per_step": 16,
        "samples_per_prompt": 4,
        "response_tokens": {"max": 4096, "mean": 1500, "p99": 4000},
        "speculative": speculative,
    }
    return {"rollout": rollout}


def static_gib(found: TrainMemoryOptions) -> float:
    return train_memory(context().model, LAYOUT, found).static_bytes / (1 << 30)


def test_gradients_and_moments_in_bf16_halve_their_bytes() -> None:
    params_gib = context().model.params_total / 2 / (1 << 30)
    plain = static_gib(options())
    assert plain - static_gib(options(train={"gradients": "bf16"})) == pytest.approx(2 * params_gib, rel=0.02)
    narrow = {"optimizer": {"precision_aware": True, "moments": "bf16"}}
    assert plain - static_gib(options(train=narrow)) == pytest.approx(4 / 2 * params_gib, rel=0.02)


def test_a_precision_aware_optimizer_makes_no_fp32_copy_of_its_gradients() -> None:
    copied, read = (
        options(train={"gradients": "bf16", "optimizer": {"precision_aware": aware}, "recompute": "full"})
        for aware in (False, True)
    )
    assert (copied.optimizer.precision_aware, read.optimizer.precision_aware) == (False, True)


def test_a_share_of_the_state_moves_to_the_host() -> None:
    model = context().model
    moved = [
        train_memory(model, LAYOUT, options(choice(optimizer_offload=True), train={"optimizer": {"offload_fraction": share}}))
        for share in (0.5, 1.0)
    ]
    assert moved[0].host_bytes == pytest.approx(moved[1].host_bytes / 2)
    assert moved[0].static_bytes > moved[1].static_bytes
    assert options(train={"optimizer": {"offload_fraction": 0.5}}).optimizer.offload_fraction == 0.0


def test_a_later_release_is_faster() -> None:
    experts = {"model": {"name": "qwen3-30b-a3b"}, "cluster": {"gpu": "gb200", "nodes": 1}}
    auto, early, late = (step(train={"release": release}, **experts) for release in ("auto", "26.02", "26.06"))
    assert auto.mid > early.mid > late.mid
    assert auto.term("host") > early.term("host") >= late.term("host") == 0.0


def test_the_embedded_engine_has_no_fused_attention() -> None:
    ctx = context(train={"engine": "torch"}, rollout=drafting()["rollout"] | {"engine": "torch", "speculative": "off"})
    assert not time_options(ctx, choice()).compute.fused_attention
    assert time_options(context(), choice()).compute.fused_attention


def test_a_draft_weighs_in_trainer_engine_and_sync() -> None:
    plain, drafted = context(), context(**drafting(**EAGLE))
    own = options(**drafting(**EAGLE)).draft_params
    assert own > 0
    assert options().draft_params == options(**drafting(method="eagle")).draft_params == 0.0  # frozen drafts do not train
    gpu, layout = plain.cluster.groups[0].gpu, RolloutLayout(engines=4)
    engines = [rollout_memory_options(ctx, gpu, layout, step_workload(ctx), resident_bytes=0.0) for ctx in (plain, drafted)]
    assert [each.draft is None for each in engines] == [True, False]
    syncs = [sync_price(ctx, LAYOUT, layout, "nccl_broadcast", 1 << 30).term("broadcast") for ctx in (plain, drafted)]
    assert syncs[1] / syncs[0] == pytest.approx(1 + own / plain.model.params_total)


def test_a_plan_carries_what_its_engine_must_obey() -> None:
    job = {
        "version": 1,
        "name": "test",
        "model": {"name": "qwen3-8b"},
        "cluster": {"gpu": "h200", "nodes": 1},
        "algorithm": {"kind": "grpo"},
        "data": {"prompts": {"generator": "arithmetic"}, "reward": "math"},
        "train": {
            "layout": {"tp": 2},
            "gradients": "bf16",
            "release": "26.06",
            "optimizer": {"precision_aware": True, "moments": "bf16", "offload": "host", "offload_fraction": 0.5},
        },
        **drafting(**EAGLE),
    }
    plan = compile_job(job_from_mapping(job)).plan
    train = plan.graph.task("train")
    assert (train.gradients, train.release, train.offload_fraction) == ("bf16", "26.06", 0.5)  # type: ignore[union-attr]
    assert (train.optimizer.precision_aware, train.optimizer.moments) == (True, "bf16")  # type: ignore[union-attr]
    phase = next(each for timeline in plan.graph.memory for each in timeline.phases if each.name == "train")
    assert any(term.name == "draft" and term.size_bytes > 0 for term in phase.terms)
    hosts = [each for timeline in plan.graph.memory if timeline.place == "host" for each in timeline.phases]
    trains = [phase for phase in hosts if phase.name in ("train", "save")]
    assert len(trains) >= 2
    assert all(any(term.name == "offloaded states" for term in phase.terms) for phase in trains)


def test_a_trainer_that_takes_turns_loses_no_more_to_its_allocator() -> None:
    job = {
        "version": 1,
        "name": "test",
        "model": {"name": "qwen3-8b"},
        "cluster": {"gpu": "h200", "nodes": 1},
        "algorithm": {"kind": "grpo"},
        "data": {"prompts": {"generator": "arithmetic"}, "reward": "math"},
        "train": {"layout": {"tp": 2}, "tokens_per_gpu": 8192},
        **drafting(method="eagle"),
    }

    def spread(placement: str) -> float:
        plan = compile_job(job_from_mapping(job | {"placement": placement})).plan
        phases = [each for timeline in plan.graph.memory if timeline.place == "gpu" for each in timeline.phases]
        train = next(phase for phase in phases if phase.name == "train")
        return train.high_bytes / train.total_bytes - 1.0

    assert spread("colocate") == pytest.approx(0.04, abs=0.001)
    assert spread("disaggregate") == pytest.approx(0.04, abs=0.001)


def test_a_gpu_that_nobody_measured_says_so() -> None:
    job = {
        "version": 1,
        "name": "test",
        "model": {"name": "qwen3-8b"},
        "algorithm": {"kind": "grpo"},
        "data": {"prompts": {"generator": "arithmetic"}, "reward": "math"},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "response_tokens": {"max": 1024}},
    }
    said = {
        gpu: [
            each.value
            for each in compile_job(job_from_mapping({**job, "cluster": {"gpu": gpu, "nodes": 1}})).plan.decisions
            if each.field == "cluster.profile"
        ]
        for gpu in ("h200", "mi300x")
    }
    assert said == {"h200": [], "mi300x": ["no data for mi300x"]}
