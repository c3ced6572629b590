"""What a plan asks that this executor or its engines cannot do: said before anything starts, never ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from miles_plan.backends.executor.engine_factories import DTYPES, ROLLOUT_ENGINES, TRAINERS
from miles_plan.backends.executor.operations.table import OPERATIONS
from miles_plan.backends.executor.run_state import publishes
from miles_plan.diagnostics import Diagnostic, error
from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import Advantage, AnyTask, Buffer, DraftStep, Logprobs, Rollout, Task, TrainStep, WeightSync

EMBEDDED = "torch"
REQUIREMENTS = {"megatron": "megatron_engine", "fsdp2": "fsdp_engine", "sglang": "sglang_engine"}

OBSTACLES: tuple[tuple[type[Task], Callable[[Any], bool], str], ...] = (
    (Rollout, lambda task: task.partial, "partial rollout: an engine finishes every sample (rollout.partial)"),
    (Rollout, lambda task: task.keep_prompts, "over-sampling: an engine waits for all samples (rollout.over_sampling)"),
    (TrainStep, lambda task: task.model != "policy", "a critic (algorithm.kind: ppo)"),
    (Logprobs, lambda task: task.model == "teacher", "a teacher model (algorithm.kind: distillation)"),
    (Advantage, lambda task: task.estimator == "gae", "a critic (algorithm.kind: ppo)"),
    (Advantage, lambda task: task.estimator == "distillation", "a teacher model (algorithm.kind: distillation)"),
    (WeightSync, lambda task: task.transport in ("p2p", "disk_delta"), "weights by p2p or disk_delta (weight_sync.transport)"),
    (Buffer, lambda task: task.capacity_samples < 1, "a buffer that holds nothing"),
)
# What only the embedded engines lack; the others say so themselves, in `requirements` beside each.
EMBEDDED_OBSTACLES: tuple[tuple[type[Task], Callable[[Any], bool], str], ...] = (
    (Rollout, lambda task: task.speculation and task.speculation.method != "eagle", "a draft inside the model (method: mtp)"),
    (Rollout, lambda task: task.speculation and task.speculation.topk > 1, "a tree of drafts (rollout.speculative.topk)"),
    (TrainStep, lambda task: task.optimizer_offload, "an optimizer that lives on the host (train.optimizer.offload)"),
    (WeightSync, lambda task: task.transport not in (None, "shared_memory"), "weights by any way but shared memory"),
)


def unsupported(plan: Plan) -> list[Diagnostic]:
    """Findings, each of which stops the run."""
    return [*_engines(plan), *_cluster(plan), *_model(plan), *_edges(plan.graph), *_tasks(plan.graph)]


def _engines(plan: Plan) -> Iterator[Diagnostic]:
    for group in plan.graph.groups:
        drivable = {"train": TRAINERS, "rollout": ROLLOUT_ENGINES}.get(group.role, {})
        if group.role != "host" and group.engine not in drivable:
            yield error(
                "MP430",
                f"@{group.name} runs on the engine '{group.engine}', which this executor cannot drive",
                field=f"{group.role}.engine",
                help=f"set {group.role}.engine to {' or '.join(drivable)}",
            )
        elif group.role != "host" and group.engine != EMBEDDED:
            yield from requirements(group.engine)(plan, group)
    trainers = [group.name for group in plan.graph.groups if group.role == "train"]
    if len(trainers) > 1:
        yield error("MP431", f"the plan has {len(trainers)} trainers ({', '.join(trainers)}); one is what this executor runs")
    embedded = {group.role for group in plan.graph.groups if group.engine == EMBEDDED}
    for side, dtype in (("train", plan.run.train_dtype), ("rollout", plan.run.rollout_dtype)):
        if side in embedded and dtype not in DTYPES:
            yield error(
                "MP432",
                f"the embedded engines compute in {' or '.join(DTYPES)}, the plan says {dtype} for {side}",
                field=f"precision.{side}",
                help=f"set precision.{side} to {' or '.join(DTYPES)}",
            )


def requirements(engine: str) -> Callable[[Plan, DeviceGroup], Iterator[Diagnostic]]:
    """What an engine says of a plan and a group before anything starts."""
    module = import_module(f"miles_plan.backends.{REQUIREMENTS[engine]}.requirements")
    check: Callable[[Plan, DeviceGroup], Iterator[Diagnostic]] = module.problems
    return check


def _cluster(plan: Plan) -> Iterator[Diagnostic]:
    used = max((group.gpus.end for group in plan.graph.groups if group.gpus is not None), default=0)
    if plan.cluster.gpu != "cpu" and used > plan.cluster.gpus_per_node:
        yield error(
            "MP433",
            f"the plan uses {used} GPUs on {plan.cluster.nodes} nodes; this executor runs on one node",
            field="cluster.nodes",
            help="set cluster.nodes: 1; plans for several nodes are compiled, not yet executed",
        )


def _model(plan: Plan) -> Iterator[Diagnostic]:
    if plan.run.model.checkpoint is None and plan.run.model.hf_config is None:
        yield error(
            "MP434",
            f"'{plan.run.model.name}' is a name in the catalog: there are no weights and no configuration to run",
            field="model",
            help="set model.checkpoint to a local folder, or model.hf_config for random weights",
        )


def _edges(graph: TaskGraph) -> Iterator[Diagnostic]:
    for edge in graph.edges:
        across = graph.task(edge.src).loop != graph.task(edge.dst).loop
        if (edge.distance or across) and edge.carries not in ("weights", "draft_weights", "order"):
            yield error("MP435", f"{edge.carries} of %{edge.src} reach %{edge.dst} in a later iteration; only weights can")


def _tasks(graph: TaskGraph) -> Iterator[Diagnostic]:
    for task in graph.tasks:
        if task.kind not in OPERATIONS:
            yield _refusal(task, f"this executor has no '{task.kind}'")
        found = [*_obstacles(graph, task), *_draft_obstacles(graph, task), *_transport_obstacles(graph, task)]
        yield from (_refusal(task, why) for why in dict.fromkeys(found))


def _obstacles(graph: TaskGraph, task: AnyTask) -> Iterator[str]:
    """What the task asks for that is not there."""
    embedded = graph.group(task.group).engine == EMBEDDED if task.group else False
    for kind, asks, what in (*OBSTACLES, *(EMBEDDED_OBSTACLES if embedded else ())):
        if isinstance(task, kind) and asks(task):
            yield what


def _transport_obstacles(graph: TaskGraph, task: AnyTask) -> Iterator[str]:
    """From one GPU's memory to another's there is only one version of the weights: the one that the trainer holds."""
    if not isinstance(task, WeightSync) or task.transport in (None, "shared_memory"):
        return
    trainer = next((group for group in graph.groups if group.role == "train"), None)
    if trainer is not None and trainer.engine == EMBEDDED:
        yield "weights by any way but shared memory: the embedded trainer has no other"
    if any(publishes(graph, each.name) for each in graph.of_kind(TrainStep)):
        yield f"weights of an earlier step by {task.transport}: only the newest can be sent (schedule.mode)"


def _draft_obstacles(graph: TaskGraph, task: AnyTask) -> Iterator[str]:
    """A draft comes from the trainer, which has no pipeline stages then."""
    if isinstance(task, Rollout) and task.speculation and not graph.of_kind(DraftStep):
        yield "a draft that nobody trains (rollout.speculative.train)"
    layout = graph.group(task.group or "").train_layout if isinstance(task, DraftStep) else None
    if layout is not None and layout.pp > 1:
        yield "a draft beside pipeline stages (train.layout.pp)"


def _refusal(task: AnyTask, why: str) -> Diagnostic:
    return error("MP436", f"%{task.name}: {why}", help="leave it out of the spec; such plans are compiled, not executed")
