from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.ir.group import DeviceGroup, GpuSpan
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.plan import ClusterSummary, Plan
from miles_plan.report.cluster_map import engine_of, gpu_blocks, node_of, node_ranges, train_coordinates
from tests.report.sample_plans import load_plan

MIXED = ClusterSummary(
    gpu="h200", nodes=4, gpus_per_node=8, gpu_memory_bytes=1, host_memory_bytes=1, groups=(("h200", 2, 8), ("h100", 2, 4))
)


def test_nodes_of_a_mixed_cluster() -> None:
    assert [(each.gpu, each.first_node, each.first_gpu) for each in node_ranges(MIXED)] == [("h200", 0, 0), ("h100", 2, 16)]
    assert [node_of(MIXED, gpu) for gpu in (0, 15, 16, 23)] == [(0, 0), (1, 7), (2, 0), (3, 3)]
    with pytest.raises(ValueError, match="GPU 24"):
        node_of(MIXED, 24)


def test_blocks_cover_the_cluster_and_name_who_holds_it(disaggregated_plan: Plan) -> None:
    blocks = gpu_blocks(disaggregated_plan)
    held = [(str(block.gpus), [group.name for group in block.groups]) for block in blocks]
    assert held == [("0..15", ["train"]), ("16..31", ["rollout"])]


@given(st.integers(0, 20), st.integers(1, 12), st.integers(0, 20), st.integers(1, 12))
def test_every_gpu_lies_in_one_block_with_the_groups_that_hold_it(first: int, count: int, other: int, size: int) -> None:
    spans = {"a": GpuSpan(first=first, count=count), "b": GpuSpan(first=other, count=size)}
    plan = _plan_with(spans)
    seen = []
    for block in gpu_blocks(plan):
        for gpu in range(block.gpus.first, block.gpus.end):
            seen.append(gpu)
            holders = {name for name, span in spans.items() if span.first <= gpu < span.end}
            assert {group.name for group in block.groups} == holders
    assert seen == list(range(32))


def _plan_with(spans: dict[str, GpuSpan]) -> Plan:
    plan = load_plan("disaggregated")
    groups = tuple(DeviceGroup(name=name, role="train", engine="torch", gpus=span) for name, span in spans.items())
    return replace(plan, graph=replace(plan.graph, groups=groups))


def test_engines_and_ranks_of_gpus() -> None:
    rollout = DeviceGroup(
        name="r",
        role="rollout",
        engine="sglang",
        gpus=GpuSpan(first=16, count=16),
        rollout_layout=RolloutLayout(engines=4, tp=4),
    )
    assert [engine_of(rollout, gpu) for gpu in (16, 19, 20, 31)] == [0, 0, 1, 3]
    layout = TrainLayout(tp=2, cp=2, dp=2, pp=2)
    assert train_coordinates(layout, 0) == {"tp": 0, "cp": 0, "dp": 0, "pp": 0}
    assert train_coordinates(layout, 13) == {"tp": 1, "cp": 0, "dp": 1, "pp": 1}
