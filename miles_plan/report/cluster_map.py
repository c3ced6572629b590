"""Which groups hold which GPUs: the cluster cut into blocks of GPUs, and into runs of nodes that look alike."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from miles_plan.ir.group import DeviceGroup, GpuSpan
from miles_plan.ir.layout import TrainLayout
from miles_plan.ir.plan import ClusterSummary, Plan


@dataclass(frozen=True, slots=True)
class NodeRange:
    """Equal nodes that follow each other: `count` of them from `first_node`, the first of which holds `first_gpu`."""

    gpu: str
    first_node: int
    count: int
    gpus_per_node: int
    first_gpu: int


@dataclass(frozen=True, slots=True)
class GpuBlock:
    """GPUs that the same groups hold; no groups means that the block idles."""

    gpus: GpuSpan
    groups: tuple[DeviceGroup, ...]


@dataclass(frozen=True, slots=True)
class NodeRun:
    """Neighbouring nodes whose GPUs are held alike: the blocks of one of them, by local index, stand for all."""

    first_node: int
    count: int
    blocks: tuple[tuple[int, int, tuple[DeviceGroup, ...]], ...]  # (first local GPU, GPUs, groups)


def node_ranges(cluster: ClusterSummary) -> list[NodeRange]:
    """The cluster's nodes, equal ones together, in the order in which GPUs are numbered."""
    groups = cluster.groups or ((cluster.gpu, cluster.nodes, cluster.gpus_per_node),)
    ranges, first_node, first_gpu = [], 0, 0
    for gpu, nodes, gpus_per_node in groups:
        ranges.append(NodeRange(gpu, first_node, nodes, gpus_per_node, first_gpu))
        first_node, first_gpu = first_node + nodes, first_gpu + nodes * gpus_per_node
    return ranges


def node_of(cluster: ClusterSummary, gpu: int) -> tuple[int, int]:
    """The node that holds a GPU, and the GPU's index there. ValueError for a GPU the cluster does not have."""
    for each in node_ranges(cluster):
        if each.first_gpu <= gpu < each.first_gpu + each.count * each.gpus_per_node:
            node, local = divmod(gpu - each.first_gpu, each.gpus_per_node)
            return each.first_node + node, local
    raise ValueError(f"GPU {gpu} is not in a cluster of {cluster.num_gpus}")


def gpu_blocks(plan: Plan) -> list[GpuBlock]:
    """The whole cluster in order, cut wherever a group begins or ends."""
    groups = [group for group in plan.graph.groups if group.gpus is not None]
    cuts = {0, plan.cluster.num_gpus}
    cuts |= {at for group in groups if group.gpus for at in (group.gpus.first, group.gpus.end)}
    blocks = []
    for first, end in pairwise(sorted(cuts)):
        span = GpuSpan(first=first, count=end - first)
        blocks.append(GpuBlock(span, tuple(group for group in groups if group.gpus and group.gpus.overlaps(span))))
    return blocks


def node_runs(plan: Plan) -> list[NodeRun]:
    """The nodes in order, neighbours that are held alike put together."""
    blocks = gpu_blocks(plan)
    runs: list[NodeRun] = []
    for each in node_ranges(plan.cluster):
        for node in range(each.count):
            held = _held(blocks, GpuSpan(first=each.first_gpu + node * each.gpus_per_node, count=each.gpus_per_node))
            if runs and runs[-1].blocks == held:
                runs[-1] = NodeRun(runs[-1].first_node, runs[-1].count + 1, held)
            else:
                runs.append(NodeRun(each.first_node + node, 1, held))
    return runs


def _held(blocks: list[GpuBlock], node: GpuSpan) -> tuple[tuple[int, int, tuple[DeviceGroup, ...]], ...]:
    held = []
    for block in blocks:
        first, end = max(block.gpus.first, node.first), min(block.gpus.end, node.end)
        if first < end:
            held.append((first - node.first, end - first, block.groups))
    return tuple(held)


def engine_of(group: DeviceGroup, gpu: int) -> int | None:
    """Which of a rollout group's engines holds a GPU: engines take neighbouring GPUs. None for other groups."""
    if group.gpus is None or group.rollout_layout is None:
        return None
    return (gpu - group.gpus.first) // group.rollout_layout.gpus_per_engine


def train_coordinates(layout: TrainLayout, rank: int) -> dict[str, int]:
    """The tp, cp, dp and pp index of a trainer's rank, tp fastest, as the default order of Megatron-core numbers them."""
    found = {}
    for name, size in (("tp", layout.tp), ("cp", layout.cp), ("dp", layout.dp), ("pp", layout.pp)):
        rank, found[name] = divmod(rank, size)
    return found
