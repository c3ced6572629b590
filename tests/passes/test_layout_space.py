from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.catalog.models import find_model
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.passes.layout_space import Room, even_stages, rollout_layouts, rollout_obstacles, train_layouts, train_obstacles

MODELS = ["qwen3-8b", "qwen3-30b-a3b", "deepseek-v3"]


def room(num_gpus: int, engine: str = "megatron") -> Room:
    return Room(
        num_gpus=num_gpus,
        gpus_per_node=min(8, num_gpus),
        nvlink_domain=min(8, num_gpus),
        sequences=512,
        longest_sequence_tokens=9000,
        engine=engine,
    )


@given(st.sampled_from(MODELS), st.sampled_from([1, 2, 4, 8, 12, 16, 48, 64]), st.sampled_from(["megatron", "fsdp2", "torch"]))
@settings(max_examples=40, deadline=None)
def test_every_layout_found_has_no_obstacle_and_fills_the_room(name: str, num_gpus: int, engine: str) -> None:
    model = find_model(name)
    for layout in train_layouts(model, room(num_gpus, engine)):
        assert list(train_obstacles(layout, model, room(num_gpus, engine))) == []
        assert layout.world_size == num_gpus
    for engines in rollout_layouts(model, room(num_gpus)):
        assert list(rollout_obstacles(engines, model, room(num_gpus))) == []
        assert engines.world_size == num_gpus


@given(st.integers(1, 100), st.integers(1, 32))
def test_stages_hold_all_layers_and_differ_by_one_at_most(num_layers: int, pp: int) -> None:
    if pp > num_layers:
        return
    stages = even_stages(num_layers, pp) or (num_layers // pp,) * pp
    assert sum(stages) == num_layers
    assert max(stages) - min(stages) <= 1
    assert len(stages) == pp


@pytest.mark.parametrize(
    ("layout", "engine", "reason"),
    [
        (TrainLayout(tp=3), "megatron", "32 attention heads"),
        (TrainLayout(tp=16), "megatron", "NVLink domain"),
        (TrainLayout(pp=100), "megatron", "100 chunks"),
        (TrainLayout(ep=8, dp=8), "megatron", "no experts"),
        (TrainLayout(dp=8, tp=2), "megatron", "16 GPUs, 8 are given"),
        (TrainLayout(dp=2, tp=4), "fsdp2", "data parallel ranks only"),
        (TrainLayout(dp=4, cp=2), "torch", "neither context parallelism"),
        (TrainLayout(dp=8, stage_layers=(3,)), "megatron", "the model has 36 layers"),
    ],
)
def test_each_obstacle_is_named(layout: TrainLayout, engine: str, reason: str) -> None:
    assert any(reason in obstacle for obstacle in train_obstacles(layout, find_model("qwen3-8b"), room(8, engine)))


def test_a_layout_nobody_fixed_is_refused_with_all_its_reasons() -> None:
    layout = RolloutLayout(engines=3, tp=5, ep=5)
    reasons = list(rollout_obstacles(layout, find_model("qwen3-8b"), room(8)))
    assert len(reasons) == 4


@given(st.sampled_from(MODELS), st.sampled_from([1, 2, 6, 8, 16, 48]), st.sampled_from([1, 7, 512]))
@settings(max_examples=25, deadline=None)
def test_every_size_that_divides_is_found(name: str, num_gpus: int, sequences: int) -> None:
    model = find_model(name)
    here = replace(room(num_gpus), sequences=sequences)
    found = {(each.tp, each.pp, each.cp, each.ep, each.etp) for each in train_layouts(model, here)}
    experts = model.moe.experts if model.moe else 1
    for tp, pp, cp, ep in itertools.product((1, 2, 4, 8), (1, 2, 3, 4, 6, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16)):
        if num_gpus % (tp * pp * cp) or experts % ep:
            continue
        dp = num_gpus // (tp * pp * cp)
        stages = even_stages(model.num_layers, pp)
        layout = TrainLayout(dp=dp, tp=tp, pp=pp, cp=cp, ep=ep, sequence_parallel=tp > 1, stage_layers=stages)
        assert ((tp, pp, cp, ep, 1) in found) == (not list(train_obstacles(layout, model, here))), layout
