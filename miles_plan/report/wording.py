"""Phrases that terminal and page share, so that one plan is described in one way."""

from __future__ import annotations

from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.memory import MemoryTimeline
from miles_plan.ir.plan import ClusterSummary, Plan
from miles_plan.ir.tasks import AnyTask, RecordRouting, ReplayRouting
from miles_plan.report.cluster_map import node_of
from miles_plan.report.schedule import LoopSchedule
from miles_plan.report.units import bytes_text, count_text, plural, quantity_text, seconds_text

SMALL_PART = 5  # a need below 1/5 of the capacity gets a scale of its own


def device_noun(cluster: ClusterSummary) -> str:
    """What one place of the cluster is called: a GPU, or a rank where the embedded engines run on the CPU."""
    return "rank" if cluster.gpu == "cpu" else "GPU"


def cluster_text(cluster: ClusterSummary) -> str:
    """`128 nodes of 8 h200 (141 GiB) = 1,024 GPUs, 2 TiB of host memory a node`."""
    kinds = cluster.groups or ((cluster.gpu, cluster.nodes, cluster.gpus_per_node),)
    parts = [f"{plural(nodes, 'node')} of {gpus} {gpu}" for gpu, nodes, gpus in kinds]
    total = plural(cluster.num_gpus, device_noun(cluster))
    least = "at least " if cluster.groups else ""
    memory = (
        f"{least}{bytes_text(cluster.gpu_memory_bytes)} each, {bytes_text(cluster.host_memory_bytes)} of host memory a node"
    )
    return f"{' + '.join(parts)} = {total}; {memory}"


def memory_place(timeline: MemoryTimeline, cluster: ClusterSummary) -> str:
    """Where a timeline holds: `each GPU of 0..1023`, `each host of 0..127`."""
    if timeline.place == "gpu":
        noun = device_noun(cluster)
        return f"{noun} {timeline.gpus}" if timeline.gpus.count == 1 else f"each {noun} of {timeline.gpus}"
    nodes = nodes_text(cluster, timeline.gpus.first, timeline.gpus.end - 1)
    return f"each host of {nodes}" if ".." in nodes else f"host {nodes}"


def bar_bytes(timeline: MemoryTimeline) -> int:
    """What a full bar stands for: the usable capacity, or the largest need where that is a small part of it."""
    need = max((max(phase.high_bytes, phase.total_bytes) for phase in timeline.phases), default=0)
    return max(1, timeline.capacity_bytes if need * SMALL_PART >= timeline.capacity_bytes or not need else need)


def nodes_text(cluster: ClusterSummary, first_gpu: int, last_gpu: int) -> str:
    """The nodes that hold these GPUs: `0..127`, or `3` for one."""
    first, last = node_of(cluster, first_gpu)[0], node_of(cluster, last_gpu)[0]
    return str(first) if first == last else f"{first}..{last}"


def tightest(plan: Plan) -> list[MemoryTimeline]:
    """The GPU and the host timeline with the least room left, as a share of what there is."""
    found = []
    for place in ("gpu", "host"):
        timelines = [timeline for timeline in plan.graph.memory if timeline.place == place and timeline.phases]
        if timelines:
            found.append(max(timelines, key=lambda each: each.peak.total_bytes / max(1, each.capacity_bytes)))
    return found


def model_text(plan: Plan) -> str:
    """`deepseek-v3, 671B parameters, 37.6B active; bf16 training, fp8 rollout`."""
    model = plan.run.model
    size = f"{count_text(model.params_total)} parameters"
    if model.params_active and model.params_active != model.params_total:
        size += f", {count_text(model.params_active)} active"
    return f"{model.name}, {size}; {plan.run.train_dtype} training, {plan.run.rollout_dtype} rollout"


def group_nodes(group: DeviceGroup, cluster: ClusterSummary) -> str:
    """The nodes of a group, `` for the host's."""
    return nodes_text(cluster, group.gpus.first, group.gpus.end - 1) if group.gpus else ""


def how_often(task: AnyTask) -> str:
    """`1 in 20` for a task that does not run in every iteration, else ``."""
    return f"1 in {task.every}" if task.every > 1 else ""


def overlap_text(schedule: LoopSchedule) -> str:
    """How iterations that overlap follow each other."""
    whole, distance = seconds_text(schedule.usual_s), seconds_text(schedule.iteration_s)
    return f"one takes {whole} from end to end, a new one begins every {distance}"


def colocation_text(plan: Plan) -> str:
    """One sentence on who shares GPUs with whom."""
    groups = [group for group in plan.graph.groups if group.gpus is not None]
    shared = [(one, two) for at, one in enumerate(groups) for two in groups[at + 1 :] if one.shares_gpus_with(two)]
    if shared:
        return "; ".join(f"{one.name} and {two.name} take turns" for one, two in shared)
    return "no GPU is shared" if len(groups) > 1 else ""


def layers_text(layers: tuple[int, ...]) -> str:
    """Layer numbers with runs closed up: `3..60`, `0, 4, 8..11`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)


def routing_sentences(plan: Plan) -> list[str]:
    """What is recorded and replayed of expert routing, one sentence a task."""
    sentences = []
    for task in plan.graph.tasks:
        if isinstance(task, RecordRouting):
            sentences.append(
                f"{task.name} takes the top {task.topk} of {task.num_experts} experts in "
                f"{plural(len(task.moe_layers), 'layer')} ({layers_text(task.moe_layers)}): "
                f"{bytes_text(task.bytes_per_token)} a token as {task.dtype}"
            )
        if isinstance(task, ReplayRouting):
            share = quantity_text(task.max_mismatch_fraction, "fraction")
            limit = f"when more than {share} of tokens differ" if task.max_mismatch_fraction else "at the first that differs"
            readers = [
                each.name for each in plan.graph.tasks if getattr(each, "replay_routing", False) and each.loop == task.loop
            ]
            sentences.append(f"{task.name} hands them to {', '.join(readers)}; the run stops {limit}")
    return sentences


def split_text(axis: int | None, parts: int) -> str:
    """How one side of a weight transfer holds a tensor: `whole`, `8 parts of dim 0`."""
    return "whole" if axis is None or parts == 1 else f"{parts} parts of dim {axis}"
