from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.catalog.models import find_model
from miles_plan.cost.columns import chunk_layers, group_layouts, microbatches_in_flight, stage_kinds
from miles_plan.ir.layout import TrainLayout


@given(
    layers=st.integers(8, 130),
    pp=st.sampled_from([1, 2, 4, 8, 16]),
    vpp=st.sampled_from([1, 2, 3]),
    mtp=st.integers(0, 2),
)
def test_every_layer_lands_in_one_chunk(layers: int, pp: int, vpp: int, mtp: int) -> None:
    if layers < pp * vpp * (1 + 2 * mtp):
        return
    sizes = chunk_layers(layers, pp, vpp, (), mtp)
    assert sum(sizes) == layers
    assert len(sizes) == pp * vpp
    assert all(size >= 0 for size in sizes)


def test_deepseek_v3_keeps_room_for_its_prediction_layer() -> None:
    assert chunk_layers(61, 16, 1, (), 1) == (4,) * 15 + (1,)
    assert chunk_layers(61, 16, 1)[-1] < 4


def test_even_layers_stay_even() -> None:
    assert chunk_layers(48, 4, 1) == (12, 12, 12, 12)
    assert chunk_layers(48, 1, 1, (), 1) == (48,)


def test_stated_stages_must_add_up() -> None:
    assert chunk_layers(10, 2, 1, (7, 3)) == (7, 3)
    with pytest.raises(ValueError, match="stage_layers add up to 9, the model has 10"):
        chunk_layers(10, 2, 1, (7, 2))
    with pytest.raises(ValueError, match="cannot fill"):
        chunk_layers(2, 8, 1)


def test_prediction_layers_are_of_the_last_kind_on_the_last_stage() -> None:
    model = find_model("deepseek-v3")
    layout = TrainLayout(pp=2, dp=8, ep=8)
    ((_, plain),) = group_layouts([layout])
    ((_, predicting),) = group_layouts([layout], mtp_layers=1)
    assert stage_kinds(model, predicting).sum() == stage_kinds(model, plain).sum() + 1


def test_a_hybrid_predicts_with_attention_and_experts() -> None:
    model = find_model("nemotron-3-super")
    ((_, columns),) = group_layouts([TrainLayout(dp=8)], mtp_layers=2)
    ((_, plain),) = group_layouts([TrainLayout(dp=8)])
    extra = stage_kinds(model, columns)[0] - stage_kinds(model, plain)[0]
    assert extra.sum() == 4
    assert sum(extra > 0) == 2


def test_interleaving_holds_more_than_plain_schedules() -> None:
    assert list(microbatches_in_flight(4, 1, 16)) == [4, 3, 2, 1]
    assert microbatches_in_flight(4, 2, 16)[0] == pytest.approx(11 / 2)
    assert microbatches_in_flight(4, 2, 1)[0] == 1
