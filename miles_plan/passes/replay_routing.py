"""Rollout routing replay (R3, arXiv 2510.11370): the trainer sends every token to the experts the rollout sent it to.

Mixture-of-experts routers are discontinuous: two engines that differ in the last bit route about a tenth of a layer's tokens
differently, and log-probs jump. So the rollout records the expert ids of every token and layer, they travel as the smallest
integer that holds them, and every forward and recompute of the trainer uses them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.ffns import MoeFfn
from miles_plan.ir.graph import Fact, TaskGraph
from miles_plan.ir.plan import Decision, Estimate
from miles_plan.ir.tasks import AnyTask, Edge, Logprobs, RecordRouting, ReplayRouting, Rollout, TrainStep
from miles_plan.passes.base import Outcome, Pass, PassContext

# Between two engines the trainer's own router disagrees with the rollout's on about a tenth of a layer's tokens (Megatron-LM
# issue 4168); three times that says that something else is wrong, such as a layer map that is off by one.
SUSPICIOUS_MISMATCH_FRACTION = 0.3


@dataclass(frozen=True)
class ReplayRoutingPass(Pass):
    """Record expert ids in the rollout and replay them in the trainer, where alignment asks for it and there are experts."""

    name: ClassVar[str] = "replay_routing"
    needs: ClassVar[frozenset[Fact]] = frozenset({"placed"})
    gives: ClassVar[frozenset[Fact]] = frozenset({"aligned"})

    def run(self, graph: TaskGraph, ctx: PassContext) -> Outcome:
        """Dense models, and alignments that do not replay, pass through."""
        moe = ctx.model.moe
        alignment = next((task.alignment for task in graph.tasks if isinstance(task, Logprobs) and task.alignment), None)
        if moe is None or alignment not in ("exact", "replay"):
            return Outcome(graph=graph)
        layers = moe_layers(ctx.model)
        dtype, id_bytes = ("uint8", 1) if moe.experts <= 256 else ("uint16", 2)
        record = RecordRouting(
            name="record_routing",
            loop="rl",
            group=graph.task("advantage").group,
            moe_layers=layers,
            num_experts=moe.experts,
            topk=moe.topk,
            dtype="uint8" if dtype == "uint8" else "uint16",
            bytes_per_token=len(layers) * moe.topk * id_bytes,
        )
        replay = ReplayRouting(
            name="replay_routing",
            loop="rl",
            group=record.group,
            moe_layers=layers,
            max_mismatch_fraction=0.0 if alignment == "exact" else SUSPICIOUS_MISMATCH_FRACTION,
        )
        decision = Decision(
            field="precision.alignment.routing",
            value=f"replayed as {dtype}, {record.bytes_per_token} bytes a token",
            reason=(
                f"{len(layers)} of {ctx.model.num_layers} layers have experts, top-{moe.topk} of {moe.experts}; "
                "ids alone, gate weights are recomputed from the trainer's own router logits"
            ),
            by=self.name,
        )
        return Outcome(
            graph=_with_replay(graph, record, replay),
            decisions=(decision,),
            estimates=(_payload(ctx, record.bytes_per_token),),
        )


def moe_layers(model: ModelArchitecture) -> tuple[int, ...]:
    """Indices of the layers with experts. Dense layers are left out, and MTP layers: those are not replayed."""
    return tuple(index for index, kind in enumerate(model.layer_kinds()) if isinstance(model.kinds[kind].ffn, MoeFfn))


def _payload(ctx: PassContext, bytes_per_token: int) -> Estimate:
    """What the ids of one step weigh on the wire and in host memory; the longest responses bound it."""
    rollout = ctx.job.rollout
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    longest = rollout.response_tokens.max
    mean = rollout.response_tokens.mean
    expected = longest / 2 if mean == "auto" else mean
    return Estimate(
        name="routing payload per step",
        unit="bytes",
        low=0.0,
        mid=samples * expected * bytes_per_token,
        high=float(samples * longest * bytes_per_token),
        basis="exact per token; tokens from the length distribution",
    )


def _with_replay(graph: TaskGraph, record: RecordRouting, replay: ReplayRouting) -> TaskGraph:
    """The graph with ids recorded behind the rollout and replayed in the policy's forwards and its training step."""
    users: list[AnyTask] = [
        replace(task, replay_routing=True)
        for task in graph.tasks
        if isinstance(task, (TrainStep, Logprobs)) and task.loop == "rl" and task.model == "policy"
    ]
    rollouts = [replace(task, record_routing=True) for task in graph.tasks if isinstance(task, Rollout)]
    edges = [
        Edge(src="rollout", dst=record.name, carries="routing"),
        Edge(src=record.name, dst=replay.name, carries="routing"),
        *(Edge(src=replay.name, dst=user.name, carries="routing") for user in users),
    ]
    return graph.with_replaced(*users, *rollouts).with_tasks([record, replay], edges)
