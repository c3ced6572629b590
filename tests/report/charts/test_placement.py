from __future__ import annotations

import re
from dataclasses import replace

from miles_plan.ir.group import GpuSpan
from miles_plan.ir.plan import Plan
from miles_plan.report.charts.placement import MOST_CELLS, placement_map


def titles(plan: Plan) -> list[str]:
    return re.findall(r"<title>([^<]*)</title>", str(placement_map(plan)))


def test_every_gpu_of_a_small_cluster(disaggregated_plan: Plan) -> None:
    found = titles(disaggregated_plan)
    assert len(found) == 32
    assert found[5] == "GPU 5 (node 0, local 5)\ntrain (megatron): rank 5: pp 0, dp 0, cp 1, tp 1"
    assert found[18] == "GPU 18 (node 2, local 2)\nrollout (sglang): engine 1"


def test_every_node_of_a_large_one(moe_plan: Plan) -> None:
    found = titles(moe_plan)
    assert len(found) == 128
    assert found[127].startswith("node 127, h200 1016..1023\ntrain (megatron): rank 1016..1023: pp 15, dp 7, cp 0, tp 0..7\n")
    assert found[127].endswith("rollout (sglang): engine 31")


def test_many_nodes_a_square_of_a_huge_one(moe_plan: Plan) -> None:
    huge = replace(moe_plan, cluster=replace(moe_plan.cluster, nodes=12_500))
    found = titles(huge)
    assert len(found) <= MOST_CELLS
    assert found[0].startswith("nodes 0..24, h200 0..199\n")
    assert found[-1].startswith("nodes 12475..12499, ")
    assert found[-1].endswith("idle")
    assert len(str(placement_map(huge))) < 300_000


def test_gpus_that_nobody_holds_are_idle(disaggregated_plan: Plan) -> None:
    groups = tuple(
        replace(group, gpus=GpuSpan(first=0, count=16)) if group.name == "rollout" else group
        for group in disaggregated_plan.graph.groups
    )
    plan = replace(disaggregated_plan, graph=replace(disaggregated_plan.graph, groups=groups))
    found = titles(plan)
    assert found[20] == "GPU 20 (node 2, local 4)\nidle"
    assert found[0].count("\n") == 2, "two groups take turns"
