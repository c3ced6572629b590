"""Small plans, built by hand, that run on the real engines in a second or two after start-up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from miles_plan.ir.graph import Loop, TaskGraph
from miles_plan.ir.group import DeviceGroup, GpuSpan
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.options import LossOptions, OptimizerOptions, SamplingOptions
from miles_plan.ir.plan import ClusterSummary, DataSource, ModelSource, Plan, RunOptions, TokenizerSource
from miles_plan.ir.tasks import (
    Advantage,
    AnyTask,
    Buffer,
    Checkpoint,
    Edge,
    Evaluate,
    FilterGroups,
    Logprobs,
    Prompts,
    RecordRouting,
    ReplayRouting,
    Reward,
    Rollout,
    TrainStep,
    WeightSync,
)

DENSE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MOE: dict[str, Any] = {
    **DENSE,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def tiny_plan(
    *,
    warm: int = 2,
    iterations: int = 3,
    moe: bool = True,
    colocated: bool = True,
    distance: int = 1,
    train: TrainLayout | None = None,
    rollout: RolloutLayout | None = None,
    checkpoint_every: int = 2,
    keep: int = 2,
    evaluate_every: int = 0,
    reference: bool = True,
    max_restarts: int = 2,
    seed: int = 3,
    updates: int = 1,
    reward: str = "tests.backends.executor.tiny_rewards:share_of_digits",
    reward_failure: Literal["zero", "drop", "fail"] = "zero",
    deadline_s: float = 60.0,
    keep_prompts: int = 0,
    buffered: bool = False,
    **run: Any,
) -> Plan:
    """An SFT warm start and GRPO on sums of one-digit numbers."""
    train, rollout = train or TrainLayout(), rollout or RolloutLayout()
    first = 0 if colocated else train.world_size
    groups = (
        DeviceGroup(
            name="train", role="train", engine="torch", gpus=GpuSpan(first=0, count=train.world_size), train_layout=train
        ),
        DeviceGroup(
            name="rollout",
            role="rollout",
            engine="torch",
            gpus=GpuSpan(first=first, count=rollout.world_size),
            rollout_layout=rollout,
        ),
        DeviceGroup(name="host", role="host", engine="host"),
    )
    tasks, edges = _rl(moe=moe, distance=distance, reference=reference, updates=updates, seed=seed, deadline_s=deadline_s)
    scoring = Reward(
        name="reward",
        reward=reward,
        timeout_s=5.0,
        on_failure=reward_failure,
        loop="rl",
        group="host",
        restart="retry",
        deadline_s=60.0,
    )
    tasks.insert(3, scoring)
    if keep_prompts:
        tasks, edges = _filtered(tasks, edges, keep_prompts)
    if buffered:
        tasks, edges = _buffered(tasks, edges, capacity=16 * distance, max_staleness=distance - 1)
    loops = [Loop(name="rl", iterations=iterations)]
    tasks.append(Checkpoint(name="checkpoint", loop="rl", group="train", every=checkpoint_every, keep=keep))
    edges.append(Edge(src="train", dst="checkpoint", carries="weights"))
    if evaluate_every:
        tasks.append(
            Evaluate(
                name="evaluate",
                loop="rl",
                group="rollout",
                every=evaluate_every,
                source="evaluation.prompts",
                sampling=SamplingOptions(max_response_tokens=4, temperature=0.0),
                reward=reward,
                timeout_s=5.0,
            )
        )
        edges.append(Edge(src="sync", dst="evaluate", carries="weights"))
    if warm:
        loops.insert(0, Loop(name="warm_start", iterations=warm))
        optimizer = OptimizerOptions(learning_rate=1e-2)
        tasks += [
            Prompts(
                name="rows",
                loop="warm_start",
                group="host",
                source="warm_start.data",
                rows="demonstrations",
                prompts_per_step=8,
            ),
            TrainStep(name="sft", loop="warm_start", group="train", loss=LossOptions(kind="sft"), optimizer=optimizer),
        ]
        edges += [
            Edge(src="rows", dst="sft", carries="samples"),
            Edge(src="sft", dst="sft", carries="weights", distance=1),
            Edge(src="sft", dst="sync", carries="weights"),
            Edge(src="sft", dst="train", carries="weights"),
        ]
    graph = TaskGraph(name="tiny", loops=tuple(loops), groups=groups, tasks=tuple(tasks), edges=tuple(edges))
    num_gpus = max(group.gpus.end for group in groups if group.gpus)
    options = {"generator": "arithmetic", "options": {"seed": 1, "largest": 9}}
    return Plan(
        name="tiny",
        tool_version="0",
        spec={},
        spec_sha256="",
        sources=(),
        cluster=ClusterSummary(gpu="cpu", nodes=1, gpus_per_node=num_gpus, gpu_memory_bytes=1 << 30, host_memory_bytes=1 << 32),
        run=RunOptions(
            **{
                "seed": seed,
                "model": ModelSource(name="tiny", hf_config=MOE if moe else DENSE),
                "tokenizer": TokenizerSource(kind="characters", characters="0123456789+-*="),
                "data": tuple(
                    DataSource(name=name, **options) for name in ("data.prompts", "warm_start.data", "evaluation.prompts")
                ),
                "train_dtype": "fp32",
                "rollout_dtype": "fp32",
                "max_restarts": max_restarts,
                "tensorboard": False,
                **run,
            }
        ),
        graph=graph,
        decisions=(),
        estimates=(),
        candidates=(),
        transfers=(),
        numerics=(),
        failures=(),
        environment=(),
        imports=(),
        unread_fields=(),
    )


def _rl(
    *, moe: bool, distance: int, reference: bool, updates: int, seed: int, deadline_s: float
) -> tuple[list[AnyTask], list[Edge]]:
    rl: dict[str, Any] = {"loop": "rl", "deadline_s": deadline_s}
    host, train = {**rl, "group": "host", "restart": "retry"}, {**rl, "group": "train", "restart": "rollback"}
    rollout = {**rl, "group": "rollout", "restart": "rebuild"}
    loss = LossOptions(kind="policy_gradient", clip_high=0.28, kl_coef=0.01 if reference else 0.0)
    tasks: list[AnyTask] = [
        WeightSync(name="sync", transport="shared_memory", bucket_bytes=1 << 14, **rollout),
        Prompts(name="prompts", source="data.prompts", prompts_per_step=4, samples_per_prompt=4, seed=seed, **host),
        Rollout(
            name="rollout",
            sampling=SamplingOptions(max_response_tokens=4, seed=seed),
            samples_per_prompt=4,
            record_routing=moe,
            kv_pool_tokens=1024,
            **rollout,
        ),
        Logprobs(
            name="old_log_probs",
            model="policy",
            replay_routing=moe,
            compare_with_rollout=True,
            max_log_prob_diff=0.0 if distance == 1 else None,
            **train,
        ),
        Advantage(name="advantage", estimator="group", **host),
        TrainStep(
            name="train",
            loss=loss,
            optimizer=OptimizerOptions(learning_rate=3e-3),
            replay_routing=moe,
            updates=updates,
            **train,
        ),
    ]
    edges = [
        Edge(src="train", dst="sync", carries="weights", distance=distance),
        Edge(src="prompts", dst="rollout", carries="prompts"),
        Edge(src="sync", dst="rollout", carries="weights"),
        Edge(src="rollout", dst="reward", carries="samples"),
        Edge(src="rollout", dst="old_log_probs", carries="samples"),
        Edge(src="train", dst="old_log_probs", carries="weights", distance=1),
        Edge(src="rollout", dst="advantage", carries="samples"),
        Edge(src="reward", dst="advantage", carries="rewards"),
        Edge(src="rollout", dst="train", carries="samples"),
        Edge(src="advantage", dst="train", carries="advantages"),
        Edge(src="old_log_probs", dst="train", carries="log_probs"),
        Edge(src="train", dst="train", carries="weights", distance=1),
    ]
    if reference:
        tasks.append(Logprobs(name="reference_log_probs", model="reference", **train))
        edges += [
            Edge(src="rollout", dst="reference_log_probs", carries="samples"),
            Edge(src="reference_log_probs", dst="train", carries="log_probs"),
        ]
    if moe:
        tasks += [
            RecordRouting(
                name="record_routing", moe_layers=(0, 1), num_experts=4, topk=2, dtype="uint8", bytes_per_token=4, **host
            ),
            ReplayRouting(name="replay_routing", moe_layers=(0, 1), max_mismatch_fraction=0.0, **host),
        ]
        edges += [
            Edge(src="rollout", dst="record_routing", carries="routing"),
            Edge(src="record_routing", dst="replay_routing", carries="routing"),
            Edge(src="replay_routing", dst="old_log_probs", carries="routing"),
            Edge(src="replay_routing", dst="train", carries="routing"),
        ]
    return tasks, edges


def _filtered(tasks: list[AnyTask], edges: list[Edge], keep_prompts: int) -> tuple[list[AnyTask], list[Edge]]:
    """Dynamic sampling between the reward and everything that trains on samples."""
    task = FilterGroups(
        name="filter", keep_prompts=keep_prompts, max_rounds=3, loop="rl", group="host", restart="retry", deadline_s=60.0
    )
    before = {"reward", "record_routing"}
    moved = [
        replace(edge, src="filter") if edge.carries in ("samples", "rewards") and edge.dst not in before else edge
        for edge in edges
    ]
    inputs = [Edge(src="rollout", dst="filter", carries="samples"), Edge(src="reward", dst="filter", carries="rewards")]
    return [*tasks, task], [*moved, *inputs]


def _buffered(
    tasks: list[AnyTask], edges: list[Edge], *, capacity: int, max_staleness: int
) -> tuple[list[AnyTask], list[Edge]]:
    """A buffer in front of everything that trains on samples."""
    task = Buffer(
        name="buffer",
        capacity_samples=capacity,
        max_staleness=max_staleness,
        loop="rl",
        group="host",
        restart="retry",
        deadline_s=60.0,
    )
    source = "filter" if any(each.name == "filter" for each in tasks) else "rollout"
    before = {"reward", "record_routing", "filter"}
    moved = [
        replace(edge, src="buffer") if edge.src == source and edge.carries == "samples" and edge.dst not in before else edge
        for edge in edges
    ]
    return [*tasks, task], [*moved, Edge(src=source, dst="buffer", carries="samples")]
