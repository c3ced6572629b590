from __future__ import annotations

import pytest

from miles_plan.cost.interval import Interval
from miles_plan.cost.rl_step import ORCHESTRATION, RlStepParts, Schedule, rl_step_time


def seconds(mid: float) -> Interval:
    return Interval(mid / 2, mid, mid * 2, "calibrated")


PARTS = RlStepParts(
    rollout=seconds(40.0),
    log_prob=seconds(5.0),
    reference=None,
    train=seconds(20.0),
    sync=seconds(2.0),
    moves=seconds(1.0),
)


def test_colocated_parts_follow_each_other() -> None:
    step = rl_step_time(PARTS, "colocated")
    assert step.mid == pytest.approx(68.0 * (1 + ORCHESTRATION))
    assert step.term("rollout") == 40.0
    assert step.term("moves") == 1.0


def test_split_does_not_move_state() -> None:
    assert rl_step_time(PARTS, "split").mid == pytest.approx(67.0 * (1 + ORCHESTRATION))


def test_overlapped_counts_the_longer_side() -> None:
    assert rl_step_time(PARTS, "overlapped").mid == pytest.approx(42.0 * (1 + ORCHESTRATION))


@pytest.mark.parametrize("schedule", ["colocated", "split", "overlapped"])
def test_bounds_enclose_the_middle(schedule: Schedule) -> None:
    step = rl_step_time(PARTS, schedule)
    assert step.low < step.mid < step.high
