"""What each kind of plan starts SGLang with: whole texts, so that nothing changes unseen."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from miles_plan.backends.sglang_engine.server_arguments import (
    CHUNKED_PREFILL_TOKENS,
    GRAPH_BATCH,
    ArgumentsError,
    ServerArguments,
    server_arguments,
)
from miles_plan.cli.compile import compiled_job
from miles_plan.ir.layout import RolloutLayout
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import Speculation
from miles_plan.passes import rollout_choices

SPECS = Path("specs")
COLOCATED = """\
model_path = 'model'
dtype = 'bfloat16'
quantization = None
kv_cache_dtype = 'auto'
tp_size = 1
pp_size = 1
ep_size = 1
dp_size = 1
enable_dp_attention = False
mem_fraction_static = 0.1
max_total_tokens = {tokens}
max_running_requests = 512
chunked_prefill_size = 8192
max_prefill_tokens = 8192
page_size = 16
disable_radix_cache = False
attention_backend = 'fa3'
sampling_backend = 'pytorch'
cuda_graph_max_bs_decode = 512
disable_prefill_cuda_graph = True
enable_deterministic_inference = False
enable_return_routed_experts = False
enable_memory_saver = True
random_seed = 0
skip_tokenizer_init = True
skip_server_warmup = True
trust_remote_code = False
log_level = 'warning'
custom_weight_loader = ('miles_plan.backends.sglang_engine.receive.take_bucket',)"""


@lru_cache
def plan_of(spec: str, *settings: str) -> Plan:
    return compiled_job(str(SPECS / spec), list(settings), []).plan


def arguments_of(plan: Plan) -> ServerArguments:
    group = next(group for group in plan.graph.groups if group.role == "rollout")
    return server_arguments(plan, group, model_directory=Path("model"))


def changes(spec: str, *settings: str) -> dict[str, Any]:
    """The fields that differ from those of the colocated plan; sizes of the cache left out, they are the memory plan's."""
    base, other = arguments_of(plan_of("gpu_grpo_0_6b_colocated.yaml")), arguments_of(plan_of(spec, *settings))
    names = [field.name for field in fields(base) if field.name != "max_total_tokens"]
    return {name: getattr(other, name) for name in names if getattr(other, name) != getattr(base, name)}


def with_rollout(plan: Plan, **change: Any) -> Plan:
    return replace(plan, graph=plan.graph.with_replaced(replace(plan.graph.task("rollout"), **change)))


def with_layout(plan: Plan, **sizes: int) -> Plan:
    groups = tuple(
        replace(group, rollout_layout=RolloutLayout(**sizes)) if group.role == "rollout" else group
        for group in plan.graph.groups
    )
    return replace(plan, graph=replace(plan.graph, groups=groups))


def test_the_colocated_plan_sets_these_and_no_others() -> None:
    plan = plan_of("gpu_grpo_0_6b_colocated.yaml")
    assert str(arguments_of(plan)) == COLOCATED.format(tokens=plan.graph.task("rollout").kv_pool_tokens)


@pytest.mark.parametrize(
    ("spec", "settings", "expected"),
    [
        ("gpu_grpo_0_6b_disaggregated.yaml", (), {"enable_memory_saver": False}),
        ("gpu_grpo_0_6b_colocated.yaml", ("rollout.memory_fraction=0.4",), {"mem_fraction_static": 0.4}),
        ("gpu_grpo_0_6b_colocated.yaml", ("rollout.page_tokens=64",), {"page_size": 64}),
        (
            "gpu_grpo_0_6b_colocated.yaml",
            ("rollout.max_running=48",),
            {"max_running_requests": 48, "cuda_graph_max_bs_decode": 48},
        ),
        ("gpu_grpo_0_6b_colocated.yaml", ("rollout.prefix_sharing=false",), {"disable_radix_cache": True}),
        (
            "gpu_grpo_0_6b_colocated.yaml",
            ("precision.alignment=exact",),
            {
                "enable_deterministic_inference": True,
                "attention_backend": "miles_plan",
                "page_size": 64,
            },
        ),
        ("gpu_grpo_0_6b_colocated.yaml", ("precision.kv_cache=fp8",), {"kv_cache_dtype": "fp8_e4m3"}),
        ("gpu_grpo_0_6b_colocated.yaml", ("precision.rollout=fp8_blockwise",), {"quantization": "fp8"}),
        ("gpu_grpo_0_6b_colocated.yaml", ("seed=7",), {"random_seed": 7}),
        ("gpu_grpo_0_6b_colocated.yaml", ("cluster.gpu=b200",), {"attention_backend": "triton"}),
        ("gpu_grpo_moe_replay.yaml", (), {"mem_fraction_static": 0.2, "enable_return_routed_experts": True}),
    ],
)
def test_what_a_spec_changes_is_what_the_arguments_change(
    spec: str, settings: tuple[str, ...], expected: dict[str, Any]
) -> None:
    assert changes(spec, *settings) == expected


def test_a_layout_becomes_sizes() -> None:
    plan = with_layout(plan_of("gpu_grpo_moe_replay.yaml"), tp=4, ep=2, dp_attention=2)
    found = arguments_of(plan)
    assert (found.tp_size, found.ep_size, found.dp_size, found.enable_dp_attention) == (4, 2, 2, True)
    assert found.chunked_prefill_size == 2 * 8192  # SGLang gives each attention rank its share
    assert found.max_total_tokens == plan.graph.task("rollout").kv_pool_tokens // 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda plan: with_rollout(
                plan, speculation=Speculation(method="eagle", steps=3, topk=1, draft_tokens=4, accept_length=2.0)
            ),
            "speculative",
        ),
        (lambda plan: replace(plan, run=replace(plan.run, rollout_dtype="nvfp4")), "nvfp4"),
        (lambda plan: replace(plan, spec={**plan.spec, "precision": {"kv_cache": "fp32"}}), "fp32"),
    ],
)
def test_what_has_no_argument_is_refused(change: Any, words: str) -> None:
    with pytest.raises(ArgumentsError, match=words):
        arguments_of(change(plan_of("gpu_grpo_0_6b_colocated.yaml")))


def test_exact_alignment_needs_pages_that_our_attention_reads() -> None:
    plan = plan_of("gpu_grpo_0_6b_colocated.yaml", "precision.alignment=exact", "rollout.page_tokens=16")
    with pytest.raises(ArgumentsError, match="pages of"):
        arguments_of(plan)


def test_engines_are_started_with_what_the_memory_plan_counts() -> None:
    assert GRAPH_BATCH == rollout_choices.GRAPH_BATCH
    assert CHUNKED_PREFILL_TOKENS == rollout_choices.PREFILL_TOKENS
