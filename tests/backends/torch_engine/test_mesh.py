from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.backends.torch_engine.mesh import (
    check_rollout_layout,
    check_train_layout,
    groups_of_rank,
    open_mesh,
    stage_layers,
)
from miles_plan.backends.training.decoder_config import read_config
from miles_plan.ir.layout import RolloutLayout, TrainLayout


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_groups_of_a_kind_cover_the_world_once(tp: int, pp: int, ep: int, expert_dp: int) -> None:
    layout = TrainLayout(tp=tp, pp=pp, dp=ep * expert_dp, ep=ep, etp=tp)
    every = [groups_of_rank(layout, rank) for rank in range(layout.world_size)]
    for name, size in {"tp": tp, "pp": pp, "dp": layout.dp, "ep": ep, "expert_dp": expert_dp}.items():
        groups = {groups[name] for groups in every}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {size}
        assert all(rank in groups[name] for rank, groups in enumerate(every))


def test_rank_order_is_megatrons() -> None:
    groups = groups_of_rank(TrainLayout(tp=2, dp=4, pp=2, ep=2, etp=2), 10)
    assert groups["tp"] == (10, 11)
    assert groups["dp"] == (8, 10, 12, 14)
    assert groups["pp"] == (2, 10)
    assert groups["ep"] == (8, 10)
    assert groups["expert_dp"] == (10, 14)


def test_stages_share_the_layers() -> None:
    assert stage_layers(TrainLayout(pp=3), 7) == (range(0, 3), range(3, 5), range(5, 7))
    assert stage_layers(TrainLayout(pp=2, stage_layers=(1, 6)), 7) == (range(0, 1), range(1, 7))


def test_ranks_talk_in_their_groups(run_ranks: Callable[[int, Callable[[int, str], Any]], list[Any]]) -> None:
    layout = TrainLayout(tp=2, dp=2)

    def rank_main(rank: int, rendezvous: str) -> list[float]:
        mesh = open_mesh(layout, rank, rendezvous=rendezvous, timeout_s=30)
        groups = (mesh.world, mesh.tp, mesh.dp, mesh.pp)
        sums = [group.all_reduce_sum(torch.tensor([10.0**rank])).item() for group in groups]
        mesh.close()
        return sums

    assert run_ranks(4, rank_main) == [
        [1111, 11, 101, 1],
        [1111, 11, 1010, 10],
        [1111, 1100, 101, 100],
        [1111, 1100, 1010, 1000],
    ]


def test_sends_and_exchanges(run_ranks: Callable[[int, Callable[[int, str], Any]], list[Any]]) -> None:
    def rank_main(rank: int, rendezvous: str) -> tuple[list[float], list[int]]:
        mesh = open_mesh(TrainLayout(pp=2), rank, rendezvous=rendezvous, timeout_s=30)
        if rank == 0:
            mesh.pp.send(torch.tensor([1.5, 2.5]), to=1)
            received = torch.empty(0)
        else:
            received = mesh.pp.receive(torch.empty(2), source=0)
        rows = torch.arange(3)[:, None] + 10 * rank
        exchanged = mesh.world.all_to_all(rows, [1, 2], [1, 1] if rank == 0 else [2, 2])
        mesh.close()
        return received.tolist(), exchanged.flatten().tolist()

    assert run_ranks(2, rank_main) == [([], [0, 10]), ([1.5, 2.5], [1, 2, 11, 12])]


def test_layouts_that_cannot_be_are_listed(checkpoint: Callable[[str], Path]) -> None:
    dense, mixture = read_config(checkpoint("qwen3_tied")), read_config(checkpoint("qwen3_moe"))
    check_train_layout(TrainLayout(tp=2, dp=3), dense)
    check_train_layout(TrainLayout(tp=2, etp=2, dp=2, ep=2, pp=2), mixture)
    with pytest.raises(ValueError, match=r"cp=2 \(allowed: 1\); sequence_parallel \(allowed: false\); tp=3 does not divide"):
        check_train_layout(TrainLayout(cp=2, tp=3, sequence_parallel=True), dense)
    with pytest.raises(ValueError, match=r"pp=2 with tied embeddings.*ep=2 for a model without experts"):
        check_train_layout(TrainLayout(pp=2, dp=2, ep=2), dense)
    with pytest.raises(ValueError, match=r"etp=1 with tp=2 \(allowed: etp = tp\)"):
        check_train_layout(TrainLayout(tp=2), mixture)
    with pytest.raises(ValueError, match="ep=3 does not divide 8 experts"):
        check_train_layout(TrainLayout(dp=3, ep=3), mixture)
    with pytest.raises(ValueError, match="pp must be at least 1"):
        check_train_layout(replace(TrainLayout(), pp=0), dense)
    check_rollout_layout(RolloutLayout(tp=2, engines=4), mixture)
    with pytest.raises(ValueError, match=r"ep=2 \(allowed: 1\)"):
        check_rollout_layout(RolloutLayout(tp=2, ep=2), mixture)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 2\), got 2"):
        open_mesh(TrainLayout(tp=2), 2)
    with pytest.raises(ValueError, match="rendezvous must be tcp://HOST:PORT or file:///PATH, got None"):
        open_mesh(TrainLayout(tp=2), 0)
