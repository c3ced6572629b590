"""Drawing prompts and demonstrations: a pure function of the data, the seed and how many rows were drawn before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from miles_plan.backends.executor.drawn_prompts import DrawnPrompts
from miles_plan.backends.executor.host import HostTasks
from miles_plan.backends.executor.operations.digests import digest_of_arrays, digest_of_batch
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait
from miles_plan.data.batch import SampleBatch
from miles_plan.data.demonstrations import demonstration_batch
from miles_plan.ir.tasks import Payload, Prompts


def draw_prompts(host: HostTasks, task: Prompts, cursor: int) -> tuple[dict[str, Any], DrawnPrompts]:
    """The next prompts of a task's source."""
    drawn = DrawnPrompts(tuple(host.prompts(task).at(cursor, task.prompts_per_step)), task.samples_per_prompt)
    tokens = np.array([token for prompt in drawn.prompts for token in prompt.tokens], dtype=np.int64)
    rows = np.array([prompt.row for prompt in drawn.prompts], dtype=np.int64)
    return {"digest": digest_of_arrays({"tokens": tokens, "rows": rows})}, drawn


def draw_demonstrations(host: HostTasks, task: Prompts, cursor: int) -> tuple[dict[str, Any], SampleBatch]:
    """The next demonstrations of a task's source, as samples."""
    step = cursor // task.prompts_per_step
    batch = demonstration_batch(host.demonstrations(task).batch(step, task.prompts_per_step))
    return {"digest": digest_of_batch(batch)}, batch


def prompts(context: Context) -> Operation:
    """Draw, and move the cursor."""
    task = context.task
    assert isinstance(task, Prompts)
    cursor = context.state.cursor_before(task.name, context.instance.iteration)
    draw = draw_prompts if task.rows == "prompts" else draw_demonstrations
    calls = context.host.produce(draw, task, cursor)
    (report,) = yield Wait(f"host: draw {task.prompts_per_step} rows of '{task.source}'", calls)
    context.state.cursors[context.instance] = cursor + task.prompts_per_step
    payload: Payload = "prompts" if task.rows == "prompts" else "samples"
    return Outcome(values={payload: calls.values[0]}, digest=report["digest"])


def prompts_task(context: Context) -> Prompts:
    """The task that draws prompts for the running task's loop."""
    loop = context.task.loop
    found: Sequence[Any] = [each for each in context.flow.graph.of_kind(Prompts) if each.loop == loop]
    task = found[0]
    assert isinstance(task, Prompts)
    return task
