"""Graphs that IR tests build on: one sound GRPO iteration, and hypothesis strategies for arbitrary ones."""

from __future__ import annotations

from hypothesis import strategies as st

from miles_plan.ir.graph import Loop, TaskGraph
from miles_plan.ir.group import DeviceGroup, GpuSpan
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.memory import MemoryPhase, MemoryTerm, MemoryTimeline
from miles_plan.ir.options import LossOptions, OptimizerOptions, SamplingOptions
from miles_plan.ir.tasks import Advantage, Edge, Logprobs, Prompts, Reward, Rollout, TimeEstimate, TrainStep, WeightSync


def grpo_graph() -> TaskGraph:
    """A placed GRPO iteration on two colocated GPUs."""
    groups = (
        DeviceGroup(name="host", role="host", engine="host"),
        DeviceGroup(name="train", role="train", engine="torch", gpus=GpuSpan(first=0, count=2), train_layout=TrainLayout(tp=2)),
        DeviceGroup(
            name="rollout", role="rollout", engine="torch", gpus=GpuSpan(first=0, count=2), rollout_layout=RolloutLayout(tp=2)
        ),
    )
    tasks = (
        WeightSync(name="weight_sync", loop="rl", group="rollout"),
        Prompts(name="prompts", loop="rl", group="host", source="data.prompts", prompts_per_step=4, samples_per_prompt=2),
        Rollout(
            name="rollout",
            loop="rl",
            group="rollout",
            sampling=SamplingOptions(max_response_tokens=8),
            samples_per_prompt=2,
        ),
        Reward(name="reward", loop="rl", group="host", reward="exact_match", timeout_s=5.0),
        Logprobs(name="old_log_probs", loop="rl", group="train", model="policy"),
        Advantage(name="advantage", loop="rl", group="host", estimator="group"),
        TrainStep(
            name="train",
            loop="rl",
            group="train",
            loss=LossOptions(kind="policy_gradient"),
            optimizer=OptimizerOptions(learning_rate=1e-3),
        ),
    )
    edges = (
        Edge(src="train", dst="weight_sync", carries="weights", distance=1),
        Edge(src="prompts", dst="rollout", carries="prompts"),
        Edge(src="weight_sync", dst="rollout", carries="weights"),
        Edge(src="rollout", dst="reward", carries="samples"),
        Edge(src="rollout", dst="old_log_probs", carries="samples"),
        Edge(src="train", dst="old_log_probs", carries="weights", distance=1),
        Edge(src="rollout", dst="advantage", carries="samples"),
        Edge(src="reward", dst="advantage", carries="rewards"),
        Edge(src="rollout", dst="train", carries="samples"),
        Edge(src="advantage", dst="train", carries="advantages"),
        Edge(src="old_log_probs", dst="train", carries="log_probs"),
        Edge(src="train", dst="train", carries="weights", distance=1),
    )
    return TaskGraph(
        name="grpo",
        loops=(Loop(name="rl", iterations=3),),
        groups=groups,
        tasks=tasks,
        edges=edges,
        facts=frozenset({"logical", "placed"}),
    )


names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
seconds = st.floats(min_value=0, max_value=1e6, allow_nan=False)
estimates = st.none() | st.builds(TimeEstimate, low_s=seconds, mid_s=seconds, high_s=seconds, basis=st.text(max_size=8))
samplings = st.builds(
    SamplingOptions,
    max_response_tokens=st.integers(1, 10**9),
    temperature=st.floats(0, 10),
    stop_token_ids=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    seed=st.integers(0, 2**63 - 1),
)
losses = st.builds(
    LossOptions,
    kind=st.sampled_from(["sft", "policy_gradient"]),
    clip_low=st.floats(0, 1),
    kl_coef=st.floats(0, 1),
    ratio_level=st.sampled_from(["token", "sequence"]),
)
tasks = st.one_of(
    st.builds(Prompts, name=names, loop=names, source=st.text(max_size=12), prompts_per_step=st.integers(1, 99)),
    st.builds(Rollout, name=names, loop=names, sampling=samplings, samples_per_prompt=st.integers(1, 9), estimate=estimates),
    st.builds(
        TrainStep,
        name=names,
        loop=names,
        loss=losses,
        optimizer=st.builds(OptimizerOptions, learning_rate=st.floats(1e-12, 1.0)),
        every=st.integers(1, 5),
    ),
    st.builds(WeightSync, name=names, loop=names, transport=st.sampled_from([None, "p2p"]), bucket_bytes=st.integers(1, 99)),
)
timelines = st.builds(
    MemoryTimeline,
    place=st.sampled_from(["gpu", "host"]),
    gpus=st.builds(GpuSpan, first=st.integers(0, 9), count=st.integers(1, 9)),
    capacity_bytes=st.integers(0, 2**50),
    margin_bytes=st.integers(0, 99),
    phases=st.lists(
        st.builds(
            MemoryPhase,
            name=names,
            task=names,
            terms=st.lists(
                st.builds(MemoryTerm, name=st.text(max_size=9), owner=names, size_bytes=st.integers(0, 2**50)), max_size=2
            ).map(tuple),
            high_bytes=st.integers(0, 2**50),
        ),
        max_size=2,
    ).map(tuple),
)


@st.composite
def graphs(draw: st.DrawFn) -> TaskGraph:
    """Any graph that the types allow, sound or not."""
    found = draw(st.lists(tasks, max_size=6, unique_by=lambda task: task.name))
    ends = [task.name for task in found]
    edges = draw(
        st.lists(
            st.builds(
                Edge,
                src=names,
                dst=st.sampled_from(ends),
                carries=st.sampled_from(["samples", "weights", "order"]),
                distance=st.integers(0, 3),
            ),
            max_size=6,
        )
        if ends
        else st.just([])
    )
    return TaskGraph(
        name=draw(st.text(max_size=12)),
        loops=tuple(draw(st.lists(st.builds(Loop, name=names, iterations=st.integers(1, 9)), max_size=2))),
        groups=grpo_graph().groups[: draw(st.integers(0, 3))],
        tasks=tuple(found),
        edges=tuple(edges),
        memory=tuple(draw(st.lists(timelines, max_size=2))),
        facts=frozenset(draw(st.sets(st.sampled_from(["logical", "placed", "sized"])))),
    )
