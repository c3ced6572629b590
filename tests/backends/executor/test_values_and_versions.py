"""Values are kept exactly as long as someone can ask for them; weight versions follow from the edges."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.backends.executor.dataflow import Dataflow, Instance
from miles_plan.backends.executor.run_state import RunState, publishes, still_wanted, wanted_version
from miles_plan.backends.executor.values import Values
from tests.backends.executor.tiny_plans import tiny_plan


def simulate(flow: Dataflow, check, seed: int = 0) -> None:  # type: ignore[no-untyped-def]
    """Run a graph in some order that its edges allow, with versions and values kept as the executor keeps them."""
    values, state, done, chance = Values(flow), RunState(), flow.start(), random.Random(seed)
    while not flow.finished(done):
        instance = chance.choice(flow.ready(done, ()))
        task = flow.tasks[instance.task]
        check(instance, values, state, done)
        if task.kind == "train_step":
            state.trainer_version += 1
            state.weights_made[instance] = state.trainer_version
        elif task.kind == "weight_sync":
            state.weights_made[instance] = wanted_version(flow.graph, instance.task, instance.iteration, state.weights_made)
        values.put(instance, {payload: str(instance) for payload in task.gives})
        done = flow.after(done, instance)
        values.drop_taken(done)
    assert len(values) == 0


plans = st.builds(
    tiny_plan,
    warm=st.integers(0, 30),
    iterations=st.integers(1, 6),
    distance=st.integers(1, 3),
    colocated=st.booleans(),
    checkpoint_every=st.integers(1, 3),
    evaluate_every=st.integers(0, 3),
)


@settings(max_examples=80, deadline=None)
@given(plan=plans, seed=st.integers(0, 999))
def test_every_input_is_there_and_nothing_is_kept_too_long(plan, seed) -> None:  # type: ignore[no-untyped-def]
    flow = Dataflow(plan.graph)

    def check(instance: Instance, values: Values, state: RunState, done: dict[str, int]) -> None:
        found = {(each.src.name, each.payload): each.value for each in values.inputs_of(instance)}
        for edge in plan.graph.inputs_of(instance.task):
            source = values.source(edge.src, instance, edge.distance)
            if source is not None and edge.carries != "order":
                assert found[edge.src, edge.carries] == str(source)
        loop = plan.graph.task(instance.task).loop
        assert len(values) <= (flow.window[loop] + 2) * len(flow.loop_tasks[loop]), "those of the iterations under way"

    simulate(flow, check, seed)


@settings(max_examples=80, deadline=None)
@given(plan=plans, seed=st.integers(0, 999))
def test_a_sync_delivers_what_its_distance_says(plan, seed) -> None:  # type: ignore[no-untyped-def]
    flow = Dataflow(plan.graph)
    warm = next((loop.iterations for loop in plan.graph.loops if loop.name == "warm_start"), 0)
    distance = max(edge.distance for edge in plan.graph.inputs_of("sync"))

    def check(instance: Instance, values: Values, state: RunState, done: dict[str, int]) -> None:
        if instance.task == "sync":
            version = wanted_version(plan.graph, "sync", instance.iteration, state.weights_made)
            assert version == warm + max(0, instance.iteration - distance + 1)
            assert version <= state.trainer_version

    simulate(flow, check, seed)


@settings(max_examples=80, deadline=None)
@given(plan=plans, seed=st.integers(0, 999))
def test_a_checkpoint_can_serve_every_sync_that_follows_it(plan, seed) -> None:  # type: ignore[no-untyped-def]
    """At a checkpoint, the versions that syncs after its cut ask for are the trainer's own or among those still wanted."""
    flow = Dataflow(plan.graph)

    def check(instance: Instance, values: Values, state: RunState, done: dict[str, int]) -> None:
        if instance.task != "checkpoint":
            return
        kept = still_wanted(flow, done, state) | {state.trainer_version}
        cut = flow.cut("rl", instance.iteration, "checkpoint")
        for iteration in range(cut["sync"], flow.iterations["rl"]):
            try:
                assert wanted_version(plan.graph, "sync", iteration, state.weights_made) in kept
            except KeyError:
                break  # a later training step makes it

    simulate(flow, check, seed)


@settings(max_examples=40, deadline=None)
@given(plan=plans, seed=st.integers(0, 999))
def test_a_run_stopped_in_its_warm_start_needs_no_older_version(plan, seed) -> None:  # type: ignore[no-untyped-def]
    """It once asked for version 0, as what the warm start left behind before it had: nobody had published that."""
    flow = Dataflow(plan.graph)

    def check(instance: Instance, values: Values, state: RunState, done: dict[str, int]) -> None:
        if plan.graph.task(instance.task).loop == "warm_start":
            assert not still_wanted(flow, done, state)

    simulate(flow, check, seed)


@pytest.mark.parametrize(("distance", "published"), [(1, False), (2, True), (3, True)])
def test_weights_are_published_at_once_where_the_next_step_would_overwrite_them(distance: int, published: bool) -> None:
    assert publishes(tiny_plan(distance=distance).graph, "train") is published


def test_the_cursor_of_an_iteration_is_what_the_one_before_left() -> None:
    state = RunState(cursors={Instance("prompts", 0): 4, Instance("prompts", 1): 12})
    assert [state.cursor_before("prompts", iteration) for iteration in (0, 1, 2)] == [0, 4, 12]
