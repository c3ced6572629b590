"""The scheduler breaks no edge, books no GPU twice, always finishes, and gives GPUs their work in one fixed order."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.backends.executor.crew import Component, gpu_components
from miles_plan.backends.executor.dataflow import Dataflow, Instance, gpus_held
from miles_plan.backends.executor.rebuild import can_rebuild
from miles_plan.ir.graph import Loop, TaskGraph
from miles_plan.ir.group import DeviceGroup, GpuSpan
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.options import LossOptions, OptimizerOptions, SamplingOptions
from miles_plan.ir.tasks import Buffer, Checkpoint, Edge, Evaluate, Logprobs, Prompts, Reward, Rollout, TrainStep, WeightSync


def rl_graph(*, iterations: int, distance: int, colocated: bool, checkpoint_every: int, capacity: int, warm: int) -> TaskGraph:
    """A GRPO loop with a buffer, after an optional warm start."""
    groups = (
        DeviceGroup(name="host", role="host", engine="host"),
        DeviceGroup(name="train", role="train", engine="torch", gpus=GpuSpan(first=0, count=1), train_layout=TrainLayout()),
        DeviceGroup(
            name="rollout",
            role="rollout",
            engine="torch",
            gpus=GpuSpan(first=0 if colocated else 1, count=1),
            rollout_layout=RolloutLayout(),
        ),
    )
    sampling = SamplingOptions(max_response_tokens=4)
    optimizer = OptimizerOptions(learning_rate=1e-3)
    rl, host, train, rollout = {"loop": "rl"}, {"group": "host"}, {"group": "train"}, {"group": "rollout"}
    tasks = [
        Prompts(name="prompts", source="d", prompts_per_step=2, samples_per_prompt=2, **rl, **host),
        WeightSync(name="sync", transport="shared_memory", bucket_bytes=1, **rl, **rollout),
        Rollout(name="rollout", sampling=sampling, samples_per_prompt=2, **rl, **rollout),
        Reward(name="reward", reward="exact", timeout_s=1.0, **rl, **host),
        Buffer(name="buffer", capacity_samples=capacity, max_staleness=distance - 1, **rl, **host),
        Logprobs(name="logprobs", model="policy", **rl, **train),
        TrainStep(name="train", loss=LossOptions(kind="policy_gradient"), optimizer=optimizer, **rl, **train),
        Checkpoint(name="checkpoint", every=checkpoint_every, **rl, **train),
        Evaluate(name="evaluate", source="d", sampling=sampling, reward="exact", timeout_s=1.0, every=2, **rl, **rollout),
    ]
    edges = [
        Edge(src="train", dst="sync", carries="weights", distance=distance),
        Edge(src="prompts", dst="rollout", carries="prompts"),
        Edge(src="sync", dst="rollout", carries="weights"),
        Edge(src="rollout", dst="reward", carries="samples"),
        Edge(src="rollout", dst="buffer", carries="samples"),
        Edge(src="reward", dst="buffer", carries="rewards"),
        Edge(src="buffer", dst="logprobs", carries="samples"),
        Edge(src="buffer", dst="train", carries="samples"),
        Edge(src="logprobs", dst="train", carries="log_probs"),
        Edge(src="train", dst="checkpoint", carries="weights"),
        Edge(src="sync", dst="evaluate", carries="weights"),
    ]
    loops = [Loop(name="rl", iterations=iterations)]
    if warm:
        loops.insert(0, Loop(name="warm_start", iterations=warm))
        tasks += [
            Prompts(name="rows", source="d", rows="demonstrations", prompts_per_step=2, loop="warm_start", group="host"),
            TrainStep(name="sft", loss=LossOptions(kind="sft"), optimizer=optimizer, loop="warm_start", group="train"),
        ]
        edges += [Edge(src="rows", dst="sft", carries="samples"), Edge(src="sft", dst="sync", carries="weights")]
    return TaskGraph(name="g", loops=tuple(loops), groups=groups, tasks=tuple(tasks), edges=tuple(edges))


graphs = st.builds(
    rl_graph,
    iterations=st.integers(1, 6),
    distance=st.integers(1, 3),
    colocated=st.booleans(),
    checkpoint_every=st.integers(1, 4),
    capacity=st.integers(4, 12),
    warm=st.integers(0, 2),
)


@dataclass
class Simulation:
    """Runs a dataflow to its end, completing running instances in an order of its own; records who started when."""

    flow: Dataflow
    seed: int
    started: list[Instance] = field(default_factory=list)
    trained: dict[Instance, int] = field(default_factory=dict)
    completed: dict[Instance, int] = field(default_factory=dict)

    def run(self) -> Simulation:
        chance, done, running = random.Random(self.seed), self.flow.start(), list[Instance]()
        while not self.flow.finished(done):
            for instance in self.flow.ready(done, running):
                self.check_start(instance, running)
                self.started.append(instance)
                self.trained[instance] = sum(each.task == "train" for each in self.completed)
                running.append(instance)
            assert running, f"nothing runs and nothing may start: {done}"
            finished = running.pop(chance.randrange(len(running)))
            done = self.flow.after(done, finished)
            self.completed[finished] = len(self.completed)
        return self

    def trained_before(self, instance: Instance) -> int:
        """Training steps that were done when the instance started."""
        return self.trained[instance]

    def check_start(self, instance: Instance, running: list[Instance]) -> None:
        graph = self.flow.graph
        for other in running:
            assert not gpus_held(graph, graph.task(instance.task)) & gpus_held(graph, graph.task(other.task)), (instance, other)
        for edge in graph.inputs_of(instance.task):
            src = graph.task(edge.src)
            same_loop = src.loop == graph.task(instance.task).loop
            wanted = instance.iteration - edge.distance if same_loop else graph.loop(src.loop).iterations - 1
            if wanted >= 0 and self.flow.runs(edge.src, wanted):
                assert Instance(edge.src, wanted) in self.completed, f"{instance} started before {edge.src}@{wanted}"


@settings(max_examples=150, deadline=None)
@given(graph=graphs, seed=st.integers(0, 2**20))
def test_every_instance_runs_once_and_no_rule_is_broken(graph: TaskGraph, seed: int) -> None:
    flow = Dataflow(graph)
    simulation = Simulation(flow, seed).run()
    expected = {
        Instance(task.name, iteration)
        for task in graph.tasks
        for iteration in range(graph.loop(task.loop).iterations)
        if flow.runs(task.name, iteration)
    }
    assert len(simulation.started) == len(expected)
    assert set(simulation.completed) == expected


@settings(max_examples=80, deadline=None)
@given(graph=graphs, seeds=st.tuples(st.integers(0, 2**20), st.integers(0, 2**20)))
def test_each_gpu_sees_its_work_in_one_order_whatever_the_timing(graph: TaskGraph, seeds: tuple[int, int]) -> None:
    flow = Dataflow(graph)

    def by_gpu(simulation: Simulation) -> dict[int, list[Instance]]:
        found: dict[int, list[Instance]] = defaultdict(list)
        for instance in simulation.started:
            for gpu in flow.holds[instance.task]:
                found[gpu].append(instance)
        return found

    one, other = (by_gpu(Simulation(flow, seed).run()) for seed in seeds)
    assert one == other


@settings(max_examples=80, deadline=None)
@given(graph=graphs, seed=st.integers(0, 2**20))
def test_samples_are_never_older_than_the_edge_allows(graph: TaskGraph, seed: int) -> None:
    """Weights that sampled a batch are at most distance - 1 training steps older than the weights it then trains."""
    simulation = Simulation(Dataflow(graph), seed).run()
    distance = next(edge.distance for edge in graph.edges if edge.dst == "sync" and edge.src == "train")
    trained = 0
    version_of: dict[int, int] = {}
    for instance in sorted(simulation.completed, key=simulation.completed.__getitem__):
        if instance.task == "sync":
            version_of[instance.iteration] = max(0, instance.iteration - distance + 1)
            assert version_of[instance.iteration] <= trained
        if instance.task == "train":
            assert trained - version_of[instance.iteration] <= distance - 1
            trained += 1


@settings(max_examples=80, deadline=None)
@given(graph=graphs, seed=st.integers(0, 2**20))
def test_a_buffer_never_holds_more_than_its_capacity(graph: TaskGraph, seed: int) -> None:
    """Samples wait in it from the moment they come in until the training step that takes them is done."""
    simulation = Simulation(Dataflow(graph), seed).run()
    (buffer,) = [task for task in graph.tasks if isinstance(task, Buffer)]
    held = 0
    for instance in simulation.started:
        held += 4 if instance.task == "buffer" else 0
        trained = simulation.trained_before(instance)
        assert held - 4 * trained <= buffer.capacity_samples


def test_a_sync_next_to_its_trainer_holds_both() -> None:
    for distance, gpus in ((1, {0, 1}), (2, {1})):
        graph = rl_graph(iterations=2, distance=distance, colocated=False, checkpoint_every=9, capacity=12, warm=0)
        assert gpus_held(graph, graph.task("sync")) == gpus


@settings(max_examples=60, deadline=None)
@given(graph=graphs, seed=st.integers(0, 2**20))
def test_a_checkpoint_cuts_between_iterations(graph: TaskGraph, seed: int) -> None:
    """When a checkpoint starts, all of its iteration is over; resuming from it runs exactly the rest."""
    flow = Dataflow(graph)
    simulation = Simulation(flow, seed).run()
    for instance, position in simulation.completed.items():
        if instance.task == "checkpoint":
            for other, when in simulation.completed.items():
                if graph.task(other.task).loop == "rl" and other.iteration <= instance.iteration and other != instance:
                    assert when < position, (instance, other)
            done = flow.cut("rl", instance.iteration, "checkpoint")
            assert done["train"] == instance.iteration + 1
            assert flow.finished(done) == (instance.iteration + 1 == graph.loop("rl").iterations)


@pytest.mark.parametrize("colocated", [True, False])
def test_one_step_off_overlaps_only_where_gpus_differ(colocated: bool) -> None:
    flow = Dataflow(rl_graph(iterations=4, distance=2, colocated=colocated, checkpoint_every=9, capacity=12, warm=0))
    done = {**flow.cut("rl", 0), "prompts": 2, "sync": 2, "train": 0}  # iteration 0 is sampled, scored, and not yet trained on
    overlapping = flow.ready(done, [])
    assert (Instance("rollout", 1) in overlapping) is not colocated
    assert Instance("train", 0) in overlapping


def test_prefetching_is_bounded() -> None:
    flow = Dataflow(rl_graph(iterations=50, distance=1, colocated=True, checkpoint_every=9, capacity=12, warm=0))
    done, fetched = flow.start(), 0
    while Instance("prompts", fetched) in flow.ready(done, []):
        done, fetched = flow.after(done, Instance("prompts", fetched)), fetched + 1
    assert fetched == 2


def test_out_of_order_completion_is_refused() -> None:
    flow = Dataflow(rl_graph(iterations=3, distance=1, colocated=True, checkpoint_every=9, capacity=12, warm=0))
    with pytest.raises(ValueError, match="prompts@0 is next"):
        flow.after(flow.start(), Instance("prompts", 1))


def test_groups_that_share_gpus_are_placed_together() -> None:
    together = rl_graph(iterations=1, distance=1, colocated=True, checkpoint_every=1, capacity=4, warm=0)
    apart = rl_graph(iterations=1, distance=1, colocated=False, checkpoint_every=1, capacity=4, warm=0)
    assert gpu_components(together) == [Component(("train", "rollout"), (0,))]
    assert gpu_components(apart) == [Component(("train",), (0,)), Component(("rollout",), (1,))]
    assert not can_rebuild(together, "rollout")
    assert can_rebuild(apart, "rollout")
