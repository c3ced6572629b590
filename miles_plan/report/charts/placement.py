"""The placement map: every GPU of a small cluster, every node of a large one, many nodes a cell of a huge one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from markupsafe import Markup

from miles_plan.ir.group import DeviceGroup, GpuSpan
from miles_plan.ir.plan import Plan
from miles_plan.report.cluster_map import GpuBlock, NodeRange, engine_of, gpu_blocks, node_ranges, train_coordinates
from miles_plan.report.svg import NARROWEST, element, figure, label, polygon, rectangle
from miles_plan.report.wording import device_noun

WIDTH = 1040
MOST_NODES_WITH_GPUS = 40
MOST_CELLS = 512
GPU, GPU_GAP, NODE_PAD, NODE_LABEL, NODE_GAP = 24, 3, 8, 18, 12
NARROWEST_NODE = 128  # its number at the left and its kind of GPU at the right
CELL, CELL_GAP, CELLS_A_ROW, ROW_LABEL = 24, 4, 32, 84


@dataclass(frozen=True, slots=True)
class Cell:
    """What one square stands for."""

    gpus: GpuSpan
    title: str


def placement_map(plan: Plan) -> Markup:
    """The cluster in order of node number, coloured by the groups that hold it."""
    nodes = sum(each.count for each in node_ranges(plan.cluster))
    noun = device_noun(plan.cluster)
    title = f"Placement on {nodes:,} nodes, {plan.cluster.num_gpus:,} {noun}s"
    blocks = gpu_blocks(plan)
    if nodes <= MOST_NODES_WITH_GPUS:
        return _map_of_gpus(plan, blocks, title)
    return _map_of_nodes(plan, blocks, title, ceil(nodes / MOST_CELLS))


def _map_of_gpus(plan: Plan, blocks: Sequence[GpuBlock], title: str) -> Markup:
    """A box a node, a square a GPU."""
    noun = device_noun(plan.cluster)
    parts: list[Markup] = []
    x, y, row_height = 0.0, 0.0, 0.0
    for each in node_ranges(plan.cluster):
        columns = min(each.gpus_per_node, 16)
        width = max(NARROWEST_NODE, columns * (GPU + GPU_GAP) - GPU_GAP + 2 * NODE_PAD)
        height = ceil(each.gpus_per_node / columns) * (GPU + GPU_GAP) - GPU_GAP + 2 * NODE_PAD + NODE_LABEL
        for node in range(each.count):
            if x and x + width > WIDTH:
                x, y, row_height = 0.0, y + row_height + NODE_GAP, 0.0
            parts += _node_box(each, each.first_node + node, x, y, width, height)
            for local in range(each.gpus_per_node):
                gpu = each.first_gpu + node * each.gpus_per_node + local
                left = x + NODE_PAD + (local % columns) * (GPU + GPU_GAP)
                top = y + NODE_PAD + NODE_LABEL + (local // columns) * (GPU + GPU_GAP)
                cell = Cell(GpuSpan(first=gpu, count=1), f"{noun} {gpu} (node {each.first_node + node}, local {local})")
                parts.append(_cell(plan, blocks, cell, left, top, GPU))
            x, row_height = x + width + NODE_GAP, max(row_height, height)
    return figure(WIDTH, y + row_height, title, parts, narrowest=NARROWEST)


def _node_box(nodes: NodeRange, node: int, x: float, y: float, width: float, height: float) -> list[Markup]:
    return [
        rectangle(x, y, width, height, "node-box", round_=6),
        label(x + NODE_PAD, y + NODE_PAD + 8, f"node {node}", "tick"),
        label(x + width - NODE_PAD, y + NODE_PAD + 8, nodes.gpu, "tick", "end"),
    ]


def _map_of_nodes(plan: Plan, blocks: Sequence[GpuBlock], title: str, nodes_a_cell: int) -> Markup:
    """A square a node, or for every `nodes_a_cell` nodes; each row begins with its first node's number."""
    cells = [cell for each in node_ranges(plan.cluster) for cell in _node_cells(each, nodes_a_cell)]
    parts: list[Markup] = []
    for at, (node, cell) in enumerate(cells):
        row, column = divmod(at, CELLS_A_ROW)
        top = row * (CELL + CELL_GAP)
        if column == 0:
            parts.append(label(ROW_LABEL - 10, top + 16, f"node {node}", "tick", "end"))
        parts.append(_cell(plan, blocks, cell, ROW_LABEL + column * (CELL + CELL_GAP), top, CELL))
    height = ceil(len(cells) / CELLS_A_ROW) * (CELL + CELL_GAP)
    scale = f"one square = {nodes_a_cell:,} nodes" if nodes_a_cell > 1 else "one square = one node"
    parts.append(label(ROW_LABEL, height + 14, scale, "tick"))
    return figure(ROW_LABEL + CELLS_A_ROW * (CELL + CELL_GAP), height + 20, title, parts, narrowest=NARROWEST)


def _node_cells(nodes: NodeRange, nodes_a_cell: int) -> list[tuple[int, Cell]]:
    found = []
    for at in range(0, nodes.count, nodes_a_cell):
        count = min(nodes_a_cell, nodes.count - at)
        first = nodes.first_node + at
        span = GpuSpan(first=nodes.first_gpu + at * nodes.gpus_per_node, count=count * nodes.gpus_per_node)
        name = f"node {first}" if count == 1 else f"nodes {first}..{first + count - 1}"
        found.append((first, Cell(span, f"{name}, {nodes.gpu} {span}")))
    return found


def _cell(plan: Plan, blocks: Sequence[GpuBlock], cell: Cell, x: float, y: float, size: float) -> Markup:
    """A square, cut into columns where its GPUs are held differently."""
    held = [block for block in blocks if block.gpus.overlaps(cell.gpus)]
    parts: list[Markup] = [element("title", _tip(cell, held))]
    for block in held:
        first, end = max(block.gpus.first, cell.gpus.first), min(block.gpus.end, cell.gpus.end)
        left = x + size * (first - cell.gpus.first) / cell.gpus.count
        parts += _held_part(block.groups, left, y, size * (end - first) / cell.gpus.count, size)
    return element("g", *parts, class_="cell")


def _held_part(groups: Sequence[DeviceGroup], x: float, y: float, width: float, height: float) -> list[Markup]:
    """One group: a rectangle; two that take turns: a triangle each; more: a stripe each; none: an empty frame."""
    if not groups:
        return [rectangle(x + 0.5, y + 0.5, width - 1, height - 1, "idle", round_=3)]
    if len(groups) == 2:
        one, two = groups
        return [
            polygon([(x, y), (x + width, y), (x, y + height)], f"mark role-{one.role}"),
            polygon([(x + width, y), (x + width, y + height), (x, y + height)], f"mark role-{two.role}"),
        ]
    stripe = width / len(groups)
    return [rectangle(x + at * stripe, y, stripe, height, f"mark role-{each.role}") for at, each in enumerate(groups)]


def _tip(cell: Cell, held: Sequence[GpuBlock]) -> str:
    """Who holds the cell, and which ranks or engines of theirs."""
    lines = [cell.title]
    for block in held:
        span_first, span_end = max(block.gpus.first, cell.gpus.first), min(block.gpus.end, cell.gpus.end)
        lines += [_role_of(group, span_first, span_end - 1) for group in block.groups]
        if not block.groups:
            lines.append("idle")
    return "\n".join(lines)


def _role_of(group: DeviceGroup, first: int, last: int) -> str:
    """A group's part in GPUs first to last: pipeline stages and data-parallel ranks, or engines."""
    assert group.gpus is not None
    if group.train_layout is not None:
        begin = train_coordinates(group.train_layout, first - group.gpus.first)
        end = train_coordinates(group.train_layout, last - group.gpus.first)
        places = ", ".join(f"{name} {_range(begin[name], end[name])}" for name in ("pp", "dp", "cp", "tp"))
        return f"{group.name} ({group.engine}): rank {_range(first - group.gpus.first, last - group.gpus.first)}: {places}"
    engines = _range(engine_of(group, first) or 0, engine_of(group, last) or 0)
    return f"{group.name} ({group.engine}): engine {engines}"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}..{last}"
