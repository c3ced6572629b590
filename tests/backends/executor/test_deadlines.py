"""What is done about a failure follows from the restart class, from how it failed, and from the restarts that are left."""

from __future__ import annotations

import pytest

from miles_plan.backends.executor.deadlines import UNGUARDED_DEADLINE_S, Action, Cause, Failure, action_for, deadline_s
from miles_plan.ir.tasks import Prompts


def task(restart: str | None, deadline: float | None = None) -> Prompts:
    return Prompts(name="t", loop="rl", source="s", prompts_per_step=1, restart=restart, deadline_s=deadline)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("restart", "cause", "on_gpu", "expected"),
    [
        ("retry", "raised", False, "retry"),
        ("retry", "died", False, "retry"),
        ("retry", "overdue", False, "retry"),
        ("retry", "raised", True, "retry"),
        ("retry", "died", True, "rebuild"),
        ("retry", "overdue", True, "rebuild"),
        ("rebuild", "raised", True, "rebuild"),
        ("rollback", "raised", True, "rollback"),
        ("rollback", "overdue", True, "rollback"),
        ("fatal", "raised", True, "stop"),
        ("fatal", "died", False, "stop"),
        (None, "raised", True, "rollback"),
        (None, "raised", False, "retry"),
        ("retry", "refused", False, "stop"),
        ("rollback", "refused", True, "stop"),
    ],
)
def test_action(restart: str | None, cause: Cause, on_gpu: bool, expected: Action) -> None:
    failure = Failure(cause=cause, slot="train", subject="s", message="m", age_s=1.0)
    assert action_for(task(restart), failure, on_gpu=on_gpu, restarts=0, max_restarts=1) == expected
    assert action_for(task(restart), failure, on_gpu=on_gpu, restarts=1, max_restarts=1) == "stop"


def test_every_task_has_a_deadline() -> None:
    assert deadline_s(task("retry", 3.5)) == 3.5
    assert deadline_s(task("retry")) == UNGUARDED_DEADLINE_S
