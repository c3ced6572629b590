from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.backends.megatron_engine.ranks import chunk_layers, chunks_of_stage, place_of_rank
from miles_plan.ir.layout import TrainLayout

SIZES = st.integers(1, 3)


@st.composite
def layouts(draw: st.DrawFn) -> TrainLayout:
    tp, cp, dp, pp = (draw(SIZES) for _ in range(4))
    ranks = tp * cp * dp
    etp = draw(st.sampled_from([size for size in range(1, ranks + 1) if ranks % size == 0]))
    ep = draw(st.sampled_from([size for size in range(1, ranks // etp + 1) if ranks // etp % size == 0]))
    return TrainLayout(tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp, vpp=draw(SIZES) if pp > 1 else 1)


@given(layouts())
def test_places_are_a_bijection_on_both_meshes(layout):
    places = [place_of_rank(layout, rank) for rank in range(layout.world_size)]
    dense = {(each.tp, each.cp, each.dp, each.pp) for each in places}
    experts = {(each.etp, each.ep, each.expert_dp, each.pp) for each in places}
    assert len(dense) == len(experts) == layout.world_size
    assert max(each.expert_dp for each in places) == layout.expert_dp - 1


def test_the_order_is_megatrons():
    layout = TrainLayout(tp=2, cp=2, dp=2, pp=2, ep=4)
    place = place_of_rank(layout, 8 + 2 * 2 + 1)  # second stage, second replica, tp 1
    assert (place.tp, place.cp, place.dp, place.pp) == (1, 0, 1, 1)
    assert (place.etp, place.ep, place.expert_dp) == (0, 1, 1)
    with pytest.raises(ValueError, match="rank"):
        place_of_rank(layout, 16)


@given(layouts(), st.integers(1, 40))
def test_chunks_hold_every_layer_once_in_order(layout, num_layers):
    spans = chunk_layers(layout, num_layers)
    assert [layer for span in spans for layer in span] == list(range(num_layers))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1
    held = [chunk for pp in range(layout.pp) for chunk in chunks_of_stage(layout, num_layers, pp)]
    assert sorted(chunk.layers.start for chunk in held) == sorted(span.start for span in spans)
    assert sum(chunk.first for chunk in held) == sum(chunk.last for chunk in held) == 1


def test_interleaved_stages_take_every_other_chunk():
    chunks = chunks_of_stage(TrainLayout(pp=2, vpp=2), 8, 1)
    assert [chunk.layers for chunk in chunks] == [range(2, 4), range(6, 8)]
    assert [chunk.last for chunk in chunks] == [False, True]
    assert chunk_layers(TrainLayout(pp=2, stage_layers=(5, 3)), 8) == (range(0, 5), range(5, 8))
