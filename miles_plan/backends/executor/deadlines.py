"""How long a task may take, and what is done about one that fails or does not come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles_plan.ir.tasks import Task

UNGUARDED_DEADLINE_S = (
    600.0  # of a task that no guard pass has seen: long enough for any first call, short enough to be noticed
)

Action = Literal["retry", "rebuild", "rollback", "stop"]
Cause = Literal["raised", "died", "overdue", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a task failed.

    cause: `raised`: its code raised, the processes live; `died`: a process is gone; `overdue`: no answer in time, so its
    processes are given up; `refused`: a check of ours said no (log-probs too far apart, a reward that must not fail), which
    running again would not change. subject: what was being waited for; slot: whose answer that was, `host` or a group.
    """

    cause: Cause
    slot: str
    subject: str
    message: str
    age_s: float


def deadline_s(task: Task) -> float:
    """Seconds a run of the task may take."""
    return UNGUARDED_DEADLINE_S if task.deadline_s is None else task.deadline_s


def action_for(task: Task, failure: Failure, *, on_gpu: bool, restarts: int, max_restarts: int) -> Action:
    """What to do, by the task's restart class.

    A retry runs the task again in the processes that are there, so it needs them alive: where one died or is stuck, its engine
    is rebuilt instead. A task of the host can always be retried. A task without a class is treated as the mildest that is safe.
    """
    if failure.cause == "refused" or restarts >= max_restarts or task.restart == "fatal":
        return "stop"
    lost = failure.cause in ("died", "overdue")
    if not on_gpu:
        return "retry"
    if task.restart == "retry":
        return "rebuild" if lost else "retry"
    if task.restart is None:
        return "rollback"
    return task.restart
