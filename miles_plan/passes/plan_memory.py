"""The memory plan: what every GPU and host holds in each phase, and the offloads that make the phases fit.

A colocated iteration has five phases: generate, score (log-probs), train, sync, save. Where both engines fit a GPU at once
nothing moves. Where they do not, they take turns: the trainer's gradients and optimizer go to the host first, then the engine
takes its weights again, and the sync is the moment when both sides' weights and one bucket are resident together: the
transition that runs out of memory in practice, so it is a phase of its own here. Then the trainer's weights leave, and after
generation the engine's cache and weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from miles_plan.catalog.gpus import Cluster
from miles_plan.cost.rollout_memory import RolloutMemory, rollout_memory
from miles_plan.cost.train_memory import ASLEEP, MemoryBreakdown, train_memory
from miles_plan.diagnostics import Diagnostic
from miles_plan.ir.graph import Fact, TaskGraph
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.memory import MemoryPhase, MemoryTerm, MemoryTimeline
from miles_plan.ir.plan import Decision, Estimate
from miles_plan.ir.tasks import (
    AnyTask,
    Checkpoint,
    Edge,
    EnginePart,
    Offload,
    Onload,
    Quantize,
    RecordRouting,
    Rollout,
    TrainStep,
    WeightSync,
)
from miles_plan.passes.base import Outcome, Pass, PassContext
from miles_plan.passes.nothing_fits import way_out
from miles_plan.passes.pair_memory import EMBEDDED_PROCESS_BYTES, HOST_SHARE, PROCESS_BYTES, SAVE_STAGING_BYTES
from miles_plan.passes.placements import cluster_of_span
from miles_plan.passes.rollout_choices import embedded_memory, rollout_memory_options
from miles_plan.passes.sync_price import staging_bytes
from miles_plan.passes.train_choices import MARGIN_FRACTION, chosen_train, fed, memory_options, usable_bytes
from miles_plan.passes.workload import StepWorkload, step_workload

GIB = 1 << 30


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Insert offloads where the engines take turns, and write down every phase of every GPU and host."""

    name: ClassVar[str] = "plan_memory"
    needs: ClassVar[frozenset[Fact]] = frozenset({"placed", "aligned", "synced"})
    gives: ClassVar[frozenset[Fact]] = frozenset({"sized"})

    def run(self, graph: TaskGraph, ctx: PassContext) -> Outcome:
        """Size the residents, decide whether engines sleep, and check each phase against its capacity."""
        residents = _residents(graph, ctx)
        sleeping = residents.must_take_turns(min(usable_bytes(each) for each in _nodes(ctx, graph.group("train")).groups))
        if sleeping:
            graph = _with_offloads(graph, residents)
        timelines = tuple(_timelines(graph, ctx, residents, sleeping))
        graph = replace(_with_sizes(graph, residents), memory=timelines)
        diagnostics = tuple(_over_capacity(ctx, timelines, generates=residents.rollout is not None))
        if diagnostics:
            graph = replace(graph, memory=())
        return Outcome(
            graph=graph,
            diagnostics=diagnostics,
            decisions=tuple(_decisions(graph, residents, sleeping)),
            estimates=tuple(_estimates(timelines)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Residents:
    """What the two engines hold on their fullest GPU, and the step's other guests."""

    train: MemoryBreakdown
    scoring: MemoryBreakdown  # the trainer in a forward pass, beside the states that stay
    teacher: MemoryBreakdown | None  # in a forward pass, beside the trainer's states
    rollout: RolloutMemory | None
    colocated: bool
    embedded: bool
    sleeping_train_bytes: int
    bucket_bytes: int
    samples_bytes: int
    train_ranks_per_node: int
    rollout_ranks_per_node: int
    states_bytes: int  # weights, optimizer and master copies of the whole trainer, as a checkpoint holds them

    def must_take_turns(self, capacity: int) -> bool:
        """Colocated engines that do not fit one GPU together, or that size themselves to all of it, take turns."""
        if not self.colocated or self.rollout is None:
            return False
        if not self.embedded:
            return True
        return self.train.device_bytes.mid + self.rollout.awake_bytes.mid > capacity


def _residents(graph: TaskGraph, ctx: PassContext) -> Residents:
    workload = step_workload(ctx)
    choice = chosen_train(graph)
    layout = choice.layout
    step = graph.task("train")
    assert isinstance(step, TrainStep)
    group = graph.group(step.group or "")
    per_rank = workload.total_tokens / step.updates / layout.dp
    microbatches = max(1, round(per_rank / (step.tokens_per_gpu * layout.cp)))
    options = memory_options(ctx, workload, fed(ctx, workload, choice), microbatches=microbatches)
    saved = options.optimizer.bytes_per_param + options.element_bytes
    profile = _nodes(ctx, group).groups[0].gpu.profile
    train = train_memory(ctx.model, layout, options, profile)
    scoring = train_memory(ctx.model, layout, replace(options, forward_only=True), profile)
    teacher = train_memory(ctx.teacher, layout, replace(options, forward_only=True, reference="none")) if ctx.teacher else None
    embedded = ctx.job.train.engine == "torch"
    residue = 0 if embedded else int(train.asleep_bytes)
    rollout_group = next((each for each in graph.groups if each.role == "rollout"), None)
    colocated = rollout_group is not None and rollout_group.shares_gpus_with(group)
    rollout = _rollout_memory(ctx, rollout_group, workload, residue if colocated else 0)
    sync = next((task for task in graph.tasks if isinstance(task, WeightSync)), None)
    return Residents(
        train=train,
        scoring=scoring,
        teacher=teacher,
        rollout=rollout,
        colocated=colocated,
        embedded=embedded,
        sleeping_train_bytes=residue,
        bucket_bytes=staging_bytes(ctx) if sync else 0,
        samples_bytes=_samples_bytes(graph, workload),
        train_ranks_per_node=_ranks_per_node(ctx, group),
        rollout_ranks_per_node=_ranks_per_node(ctx, rollout_group) if rollout_group else 0,
        states_bytes=int((ctx.model.params_total + options.draft_params) * saved),
    )


def _rollout_memory(
    ctx: PassContext, group: DeviceGroup | None, workload: StepWorkload, resident_bytes: int
) -> RolloutMemory | None:
    if group is None or group.rollout_layout is None:
        return None
    gpu = min((each.gpu for each in _nodes(ctx, group).groups), key=lambda each: each.usable_bytes)
    options = rollout_memory_options(ctx, gpu, group.rollout_layout, workload, resident_bytes=float(resident_bytes))
    memory = rollout_memory(ctx.model, group.rollout_layout, options, gpu)
    if ctx.job.rollout.engine == "torch":
        return embedded_memory(ctx, memory, group.rollout_layout, workload)
    return memory


def _samples_bytes(graph: TaskGraph, workload: StepWorkload) -> int:
    """Token ids, log-probs, versions and routing of one step's samples, in the host's object store."""
    routing = sum(task.bytes_per_token for task in graph.tasks if isinstance(task, RecordRouting))
    return int(workload.samples * (workload.prompt_tokens + workload.lengths.mean_tokens) * (16 + routing))


def _ranks_per_node(ctx: PassContext, group: DeviceGroup) -> int:
    count = group.gpus.count if group.gpus else 0
    return min(count, _nodes(ctx, group).gpus_per_node)


def _nodes(ctx: PassContext, group: DeviceGroup) -> Cluster:
    """The nodes that a group's GPUs are in: in a cluster of several kinds each side has its own."""
    return cluster_of_span(ctx.cluster, group.gpus) if group.gpus else ctx.cluster


def _with_offloads(graph: TaskGraph, residents: Residents) -> TaskGraph:
    """The engines take turns.

    The trainer's states leave, the engine wakes for weights, they sync, the trainer's weights leave, the engine's cache wakes,
    it generates and sleeps, and the trainer comes back. The sync needs no more of the trainer than its weights.
    """
    rollout = residents.rollout
    assert rollout is not None
    states: tuple[EnginePart, ...] = ("gradients", "optimizer")
    sent: tuple[EnginePart, ...] = ("weights",)
    if residents.embedded and any(task.name == "reference_log_probs" for task in graph.tasks):
        sent = (*sent, "reference")  # cluster engines swap theirs in for the pass that needs it
    trainer_bytes = max(0, int(residents.train.static_bytes))
    states_bytes = min(trainer_bytes, sum(int(term.value) for term in residents.train.terms if term.name in states))
    tasks: list[AnyTask] = [
        Offload(name="offload_states", loop="rl", group="train", parts=states, bytes_per_gpu=states_bytes),
        Onload(name="wake_weights", loop="rl", group="rollout", parts=("weights",), bytes_per_gpu=int(rollout.weight_bytes)),
        Offload(name="offload_train", loop="rl", group="train", parts=sent, bytes_per_gpu=trainer_bytes - states_bytes),
        Onload(name="wake_cache", loop="rl", group="rollout", parts=("kv_cache",), bytes_per_gpu=int(rollout.pool_bytes)),
        Offload(
            name="sleep_rollout",
            loop="rl",
            group="rollout",
            parts=("kv_cache", "weights"),
            bytes_per_gpu=int(rollout.pool_bytes + rollout.weight_bytes),
        ),
        Onload(name="onload_train", loop="rl", group="train", parts=(*sent, *states), bytes_per_gpu=trainer_bytes),
    ]
    chain = [("offload_states", "wake_weights"), ("wake_weights", "weight_sync")]
    chain += [("weight_sync", "offload_train"), ("offload_train", "wake_cache")]
    chain += [("wake_cache", "rollout"), ("rollout", "sleep_rollout"), ("sleep_rollout", "onload_train")]
    # Quantisation belongs to the sync at the head of the iteration, when the trainer is still there from the one before.
    users = [
        task.name for task in graph.tasks if task.loop == "rl" and task.group == "train" and not isinstance(task, Quantize)
    ]
    chain += [("onload_train", name) for name in users]
    edges = [Edge(src=src, dst=dst, carries="order") for src, dst in chain]
    edges += [Edge(src=name, dst="offload_states", carries="order", distance=1) for name in users]
    if any(task.name == "evaluate" for task in graph.tasks):
        edges += [
            Edge(src="wake_cache", dst="evaluate", carries="order"),
            Edge(src="evaluate", dst="sleep_rollout", carries="order"),
        ]
    return graph.with_tasks(tasks, edges)


def _with_sizes(graph: TaskGraph, residents: Residents) -> TaskGraph:
    """What a checkpoint writes, in the tasks that write it."""
    saves = [replace(task, total_bytes=residents.states_bytes) for task in graph.tasks if isinstance(task, Checkpoint)]
    return graph.with_replaced(*saves)


def _timelines(graph: TaskGraph, ctx: PassContext, residents: Residents, sleeping: bool) -> Iterator[MemoryTimeline]:
    """One timeline a group of GPUs and one for its hosts; colocated groups share theirs."""
    for group in graph.groups:
        if group.gpus is None or (residents.colocated and group.role == "rollout"):
            continue
        nodes = _nodes(ctx, group).groups
        capacity = min(usable_bytes(each) for each in nodes)
        margin = int(nodes[0].gpu.usable_bytes * MARGIN_FRACTION)
        host_bytes = min(each.node_memory_bytes for each in nodes)
        host_capacity = int(host_bytes * HOST_SHARE)
        both = residents.colocated
        phases = tuple(_gpu_phases(graph, residents, group.role, both=both, sleeping=sleeping))
        yield MemoryTimeline(place="gpu", gpus=group.gpus, capacity_bytes=capacity, margin_bytes=margin, phases=phases)
        yield MemoryTimeline(
            place="host",
            gpus=group.gpus,
            capacity_bytes=host_capacity,
            margin_bytes=host_bytes - host_capacity,
            phases=tuple(_host_phases(graph, residents, group.role, both=both, sleeping=sleeping)),
        )


def _gpu_phases(graph: TaskGraph, residents: Residents, role: str, *, both: bool, sleeping: bool) -> Iterator[MemoryPhase]:
    trains, generates = role == "train", role == "rollout" or both
    awake, asleep = _engine_terms(residents, awake=True), _engine_terms(residents, awake=False)
    static = _trainer_terms(residents, "static")
    needed = residents.train.needed_bytes(expandable_segments=True)  # as this package's trainers take their memory
    lost = max(0, int(needed - residents.train.device_bytes.high))
    put_away = (_term("asleep", "train", residents.sleeping_train_bytes),)
    if generates and residents.rollout is not None:
        beside = () if not both else put_away if sleeping else static
        yield _phase("generate", "rollout", (*awake, *beside), spread=0.04)
    if trains:
        beside = () if not both else asleep if sleeping else awake
        if any(task.name == "old_log_probs" for task in graph.tasks):
            yield _phase("log-probs", "old_log_probs", (*_trainer_terms(residents, "forward"), *beside), spread=0.04)
        if residents.teacher is not None:
            scoring = tuple(
                _term(f"teacher {term.name}", "train", int(term.value)) for term in residents.teacher.terms if term.value >= 1.0
            )
            yield _phase("teacher", "teacher_log_probs", (*static, *scoring, *beside), spread=0.04)
        yield _phase("train", "train", (*_trainer_terms(residents, "peak"), *beside), spread=0.04, more=lost)
    if residents.rollout is not None:
        bucket = (_term("sync bucket", role, residents.bucket_bytes),)
        weights = (_term("weights", "rollout", int(residents.rollout.weight_bytes)),)
        if both and sleeping:
            kept = (*_trainer_terms(residents, "sync"), *put_away, *asleep)
            yield _phase("sync", "weight_sync", (*kept, *weights, *bucket), spread=0.04)
        elif both:
            yield _phase("sync", "weight_sync", (*static, *awake, *bucket), spread=0.04)
        else:
            yield _phase("sync", "weight_sync", (*(static if trains else awake), *bucket), spread=0.04)


def _engine_terms(residents: Residents, *, awake: bool) -> tuple[MemoryTerm, ...]:
    """An engine's parts on one of its GPUs."""
    rollout = residents.rollout
    if rollout is None:
        return ()
    if not awake:
        return (_term("asleep", "rollout", int(rollout.asleep_bytes)),)
    parts = {
        "weights": rollout.weight_bytes,
        "kv cache": rollout.pool_bytes,
        "cuda graphs": rollout.graph_bytes,
        "activations": rollout.activation_bytes,
        "context and communicators": rollout.outside_bytes,
    }
    return tuple(_term(name, "rollout", int(size)) for name, size in parts.items() if size)


BETWEEN_STEPS = (
    "parameters",
    "gradients",
    "optimizer",
    "fp8 weights",
    "reference model",
    "weight-gradient scratch",
    "workspace",
    "graph buffers",
    "draft",
    "draft states",
    "cuda context",
    "libraries",
    "communicators",
)


def _trainer_terms(residents: Residents, moment: str) -> tuple[MemoryTerm, ...]:
    """A trainer's parts on its fullest GPU: at the peak, in a forward pass beside its states, between steps ("static"), or its
    weights after its states have left ("sync"), beside which lies what a sleeping trainer keeps."""
    terms = (*residents.train.terms, *residents.train.outside_terms)
    if moment in ("static", "sync"):
        left = ("gradients", "optimizer", "draft states", *ASLEEP) if moment == "sync" else ()
        terms = tuple(term for term in terms if term.name in BETWEEN_STEPS and term.name not in left)
    elif moment == "forward":
        passing = tuple(term for term in residents.scoring.terms if term.name not in BETWEEN_STEPS)
        terms = (*(term for term in terms if term.name in BETWEEN_STEPS), *passing)
    return tuple(_term(term.name, "train", int(term.value)) for term in terms if term.value >= 1.0)


def _host_phases(graph: TaskGraph, residents: Residents, role: str, *, both: bool, sleeping: bool) -> Iterator[MemoryPhase]:
    """What one node's memory holds: processes, samples, what sleeps there, and the staging of a save."""
    ranks = (residents.train_ranks_per_node if role == "train" or both else 0) + (
        residents.rollout_ranks_per_node if (role == "rollout" or both) and not residents.embedded else 0
    )
    ranks = max(ranks, residents.train_ranks_per_node if role == "train" else residents.rollout_ranks_per_node)
    per_process = EMBEDDED_PROCESS_BYTES if residents.embedded else PROCESS_BYTES
    base = (_term("processes", role, ranks * per_process), _term("samples", role, residents.samples_bytes))
    offloaded = int(residents.train.host_bytes * residents.train_ranks_per_node) if role == "train" else 0
    always = (*base, _term("offloaded states", "train", offloaded)) if offloaded else base
    if both and sleeping:
        backup = int(residents.train.static_bytes) * residents.train_ranks_per_node
        yield _phase("generate", "rollout", (*always, _term("sleeping trainer", "train", backup)), spread=0.1)
        yield _phase("train", "train", always, spread=0.1)
    else:
        yield _phase("generate" if role == "rollout" else "train", role if role == "rollout" else "train", always, spread=0.1)
    if role == "train" and any(isinstance(task, Checkpoint) for task in graph.tasks):
        nodes = max(1, -(-_train_world(graph) // max(1, residents.train_ranks_per_node)))
        staged = residents.states_bytes // nodes
        if not residents.embedded:
            staged = min(staged, residents.train_ranks_per_node * SAVE_STAGING_BYTES)
        yield _phase("save", "checkpoint", (*always, _term("save staging", "train", staged)), spread=0.1)


def _train_world(graph: TaskGraph) -> int:
    gpus = graph.group("train").gpus
    return gpus.count if gpus else 1


def _term(name: str, owner: str, size_bytes: int) -> MemoryTerm:
    return MemoryTerm(name=name, owner=owner, size_bytes=max(0, size_bytes))


def _phase(name: str, task: str, terms: tuple[MemoryTerm, ...], *, spread: float, more: int = 0) -> MemoryPhase:
    """A phase whose upper end is a share above its terms, and so many bytes more."""
    total = sum(term.size_bytes for term in terms)
    return MemoryPhase(name=name, task=task, terms=terms, high_bytes=int(total * (1 + spread)) + more)


def _over_capacity(ctx: PassContext, timelines: tuple[MemoryTimeline, ...], *, generates: bool) -> Iterator[Diagnostic]:
    """One finding a place that overflows: the fullest phase, its dominating term, and which way to move."""
    overflowing = [timeline for timeline in timelines if timeline.peak.total_bytes > timeline.capacity_bytes]
    change, notes = way_out(ctx, generates=generates) if overflowing else ("", ())
    for timeline in overflowing:
        peak = timeline.peak
        worst = max(peak.terms, key=lambda term: term.size_bytes)
        where = "a GPU" if timeline.place == "gpu" else "a host"
        yield ctx.error(
            "MP230" if timeline.place == "gpu" else "MP231",
            f"{where} of {timeline.gpus} holds {peak.total_bytes / GIB:.1f} of {timeline.capacity_bytes / GIB:.1f} GiB "
            f"in phase '{peak.name}'; the largest part is {worst.owner}'s {worst.name}, {worst.size_bytes / GIB:.1f} GiB",
            _FIELD_OF_TERM.get(worst.name, "cluster"),
            help=change or _REMEDY_OF_TERM.get(worst.name, "use more GPUs, or GPUs with more memory"),
            notes=notes,
        )


_FIELD_OF_TERM = {
    "activations": "train.tokens_per_gpu",
    "logits": "train.tokens_per_gpu",
    "optimizer": "train.optimizer.offload",
    "kv cache": "rollout.memory_fraction",
    "sleeping trainer": "placement",
    "offloaded states": "train.optimizer.offload",
}
_REMEDY_OF_TERM = {
    "activations": "lower tokens_per_gpu, or set recompute: full",
    "logits": "lower tokens_per_gpu, or raise tp",
    "optimizer": "set train.optimizer.offload: host, or use more GPUs",
    "kv cache": "lower rollout.memory_fraction",
    "sleeping trainer": "use placement: disaggregate, or hosts with more memory",
    "offloaded states": "set train.optimizer.offload: off, or use hosts with more memory",
}


def _decisions(graph: TaskGraph, residents: Residents, sleeping: bool) -> Iterator[Decision]:
    if residents.colocated:
        yield Decision(
            field="placement.sleep",
            value="engines take turns" if sleeping else "both stay resident",
            reason=(
                f"{residents.train.static_bytes / GIB:.2f} GiB of trainer state a GPU go to the host during generation"
                if sleeping
                else "trainer and engine fit one device together, so nothing has to move"
            ),
            by=PlanMemory.name,
        )
    for task in graph.tasks:
        if isinstance(task, Rollout) and residents.rollout is not None:
            fraction = f", mem_fraction_static {task.static_fraction}" if task.static_fraction else ""
            yield Decision(
                field="rollout.memory_fraction",
                value=f"{task.kv_pool_tokens:,} tokens of KV cache an engine{fraction}",
                reason=f"{residents.rollout.kv_bytes_per_token:,.0f} bytes a token; graphs and activations keep their room",
                by=PlanMemory.name,
            )


def _estimates(timelines: tuple[MemoryTimeline, ...]) -> Iterator[Estimate]:
    for timeline in timelines:
        peak = timeline.peak
        yield Estimate(
            name=f"peak {timeline.place} memory ({timeline.gpus})",
            unit="bytes",
            low=2.0 * peak.total_bytes - peak.high_bytes,
            mid=float(peak.total_bytes),
            high=float(peak.high_bytes),
            basis="calibrated" if timeline.place == "gpu" else "counted",
            terms=tuple((f"{term.owner}.{term.name}", float(term.size_bytes)) for term in peak.terms),
        )
