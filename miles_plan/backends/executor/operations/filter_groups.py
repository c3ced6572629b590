"""Dynamic sampling (DAPO, arXiv 2503.14476): keep prompts whose samples differ in reward, draw more until there are enough."""

from __future__ import annotations

from typing import Any

import numpy as np

from miles_plan.algorithms.sample_filters import groups_with_signal
from miles_plan.backends.executor.dataflow import Instance
from miles_plan.backends.executor.drawn_prompts import DrawnPrompts
from miles_plan.backends.executor.failures import RunError
from miles_plan.backends.executor.host import HostTasks
from miles_plan.backends.executor.operations.digests import digest_of_arrays, digest_of_batch
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait, Waiting
from miles_plan.backends.executor.operations.prompts import draw_prompts, prompts_task
from miles_plan.backends.executor.operations.reward import scored
from miles_plan.backends.executor.operations.rollout import sampled, with_stops
from miles_plan.backends.executor.operations.routing import routing_problems
from miles_plan.backends.executor.operations.samples import RefusedSamplesError
from miles_plan.data.batch import Array, SampleBatch, concatenate
from miles_plan.ir.tasks import FilterGroups, Prompts, RecordRouting, Reward, Rollout, Task


def keep_groups(
    host: HostTasks, record: RecordRouting | None, drawn: DrawnPrompts, samples: SampleBatch, rewards: Array, *kept: Any
) -> tuple[dict[str, int], SampleBatch, Array, DrawnPrompts]:
    """Samples and rewards of the groups with a signal, behind those kept so far, and all prompts drawn.

    Whole prompts only. RefusedSamplesError for routing that is wrong.
    """
    if record is not None and (problems := routing_problems(samples, record)):
        raise RefusedSamplesError("; ".join(problems))
    measured = ~np.isnan(rewards)
    signal = np.zeros(samples.num_samples, dtype=bool)
    signal[measured] = groups_with_signal(rewards[measured], samples.prompt_id[measured])
    rows = np.flatnonzero(np.isin(samples.prompt_id, np.unique(samples.prompt_id[signal])))
    batch, scores, prompts = samples.select(rows), rewards[rows], drawn.prompts
    if kept:
        earlier, earlier_scores, earlier_drawn = kept
        batch, scores = concatenate([earlier, batch]), np.concatenate([earlier_scores, scores])
        prompts = (*earlier_drawn.prompts, *prompts)
    everything = DrawnPrompts(prompts, drawn.samples_per_prompt, drawn.first_id)
    return {"prompts": len(np.unique(batch.prompt_id))}, batch, scores, everything


def first_prompts(
    host: HostTasks, count: int, samples: SampleBatch, rewards: Array
) -> tuple[dict[str, Any], SampleBatch, Array]:
    """Samples and rewards of the first `count` prompts, in the order they were drawn."""
    order = samples.prompt_id[np.sort(np.unique(samples.prompt_id, return_index=True)[1])]
    rows = np.flatnonzero(np.isin(samples.prompt_id, order[:count]))
    chosen, scores = samples.select(rows), rewards[rows]
    digest = digest_of_batch(chosen) + digest_of_arrays({"rewards": scores})
    return {"digest": digest, "samples": chosen.num_samples}, chosen, scores


def filter_groups(context: Context) -> Operation:
    """Filter, and while too few prompts are left, draw, sample and score another round; the cursor moves along."""
    task = context.task
    assert isinstance(task, FilterGroups)
    source = prompts_task(context)
    drawn_in = Instance(source.name, context.instance.iteration)
    before = context.state.cursor_before(source.name, context.instance.iteration)
    context.state.cursors[drawn_in] = before + source.prompts_per_step  # also where an earlier attempt has drawn on
    record = next(iter(context.flow.graph.of_kind(RecordRouting)), None)
    drawn, samples, rewards = context.drawn, context.value("samples"), context.value("rewards")
    kept: tuple[Any, ...] = ()
    for round_number in range(1, task.max_rounds + 1):
        calls = context.host.produce(keep_groups, record, drawn, samples, rewards, *kept, values=3)
        (report,) = yield Wait("host: keep groups with a signal", calls)
        kept, num_prompts = calls.values, report["prompts"]
        if num_prompts >= task.keep_prompts or round_number == task.max_rounds:
            break
        drawn, samples, rewards = yield from _another_round(context, source, drawn_in)
    calls = context.host.produce(first_prompts, task.keep_prompts, *kept[:2], values=2)
    (report,) = yield Wait("host: take the first prompts kept", calls)
    if not report["samples"]:
        raise RunError(
            "MP512",
            f"{context.instance}: after {round_number} rounds no prompt has samples that differ in reward",
            help="the task is far too easy or far too hard for the policy, or the reward is constant",
        )
    return Outcome(
        values={"samples": calls.values[0], "rewards": calls.values[1], "prompts": kept[2]},
        figures={"filter_rounds": round_number, "filter_prompts_kept": min(num_prompts, task.keep_prompts)},
        digest=report["digest"],
    )


def _another_round(context: Context, source: Prompts, drawn_in: Instance) -> Waiting[tuple[Any, Any, Any]]:
    """Prompts, samples and rewards of one more draw, by the weights that this iteration's rollout had."""
    rollout, reward = _only(context, Rollout), _only(context, Reward)
    assert isinstance(rollout, Rollout)
    assert isinstance(reward, Reward)
    cursor = context.state.cursors[drawn_in]
    draw = context.host.produce(draw_prompts, source, cursor)
    yield Wait(f"host: draw {source.prompts_per_step} more prompts", draw)
    context.state.cursors[drawn_in] = cursor + source.prompts_per_step
    version, sampling = context.state.served[rollout.group or ""], with_stops(rollout.sampling, context.services.end_token)
    assert version is not None, "a rollout of this iteration has run on these engines"
    group = rollout.group or ""
    samples, _ = yield from sampled(context, draw.values[0], sampling, version, group=group, routed=rollout.record_routing)
    rewards, _ = yield from scored(context, reward, draw.values[0], samples)
    return draw.values[0], samples, rewards


def _only(context: Context, kind: type[Task]) -> Task:
    """The task of that kind in the running task's loop."""
    return next(each for each in context.flow.graph.of_kind(kind) if each.loop == context.task.loop)
