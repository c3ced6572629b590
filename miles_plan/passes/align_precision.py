"""Precision alignment: for every op that touches a log-prob, what trainer and rollout each run, and what is done about it.

A difference is removed (the same batch-invariant kernel on both sides), replayed (routing), corrected (importance weights from
the rollout's log-probs: TIS or MIS), or accepted with a stated threshold that the run guards. Which number formats may meet at
all is `number_formats`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from miles_plan.diagnostics import Diagnostic
from miles_plan.ir.graph import Fact, TaskGraph
from miles_plan.ir.plan import Decision, NumericsRow
from miles_plan.ir.tasks import Correct, Edge, Logprobs, Quantize, Rollout
from miles_plan.passes.alignment import Alignment, choose_alignment, exact_obstacles
from miles_plan.passes.base import Outcome, Pass, PassContext
from miles_plan.spec.job import JobSpec


@dataclass(frozen=True)
class AlignPrecision(Pass):
    """Choose the alignment, fill the two-column table, insert corrections and quantisation, set the guard's threshold."""

    name: ClassVar[str] = "align_precision"
    needs: ClassVar[frozenset[Fact]] = frozenset({"placed"})

    def run(self, graph: TaskGraph, ctx: PassContext) -> Outcome:
        """Jobs without a rollout have nothing to align."""
        if not graph.of_kind(Rollout):
            return Outcome(graph=graph)
        diagnostics = tuple(_misfits(ctx))
        alignment, reason = choose_alignment(ctx)
        threshold = _threshold(ctx.job, alignment)
        graph = graph.with_replaced(
            *(
                replace(task, alignment=alignment, max_log_prob_diff=threshold)
                for task in graph.of_kind(Logprobs)
                if isinstance(task, Logprobs) and task.compare_with_rollout
            )
        )
        if alignment == "corrected":
            graph = _with_correction(graph, ctx.job)
        if ctx.job.precision.rollout not in (ctx.job.precision.train, "int4") and ctx.job.precision.rollout != "bf16":
            graph = _with_quantization(graph, ctx.job.precision.rollout)
        decision = Decision(field="precision.alignment", value=alignment, reason=reason, by=self.name)
        return Outcome(
            graph=graph,
            diagnostics=diagnostics,
            decisions=(decision,),
            numerics=tuple(numerics_table(ctx, alignment)),
            environment=tuple(_environment(ctx.job, alignment)),
        )


def _misfits(ctx: PassContext) -> Iterator[Diagnostic]:
    job = ctx.job
    if job.precision.alignment == "exact":
        for where, problem, remedy in exact_obstacles(ctx):
            yield ctx.error("MP304", f"alignment: exact cannot be kept: {problem}", where, help=remedy)
    if job.precision.alignment == "replay" and ctx.model.moe is None:
        yield ctx.error(
            "MP305",
            f"{ctx.model.name} has no experts, so there is no routing to replay",
            "precision.alignment",
            help="use exact, corrected or off",
        )


def _threshold(job: JobSpec, alignment: Alignment) -> float | None:
    asked = job.precision.max_log_prob_diff
    if asked != "auto":
        return asked
    return 0.0 if alignment == "exact" else None


def _with_correction(graph: TaskGraph, job: JobSpec) -> TaskGraph:
    """Importance weights between the rollout's and the trainer's log-probs, on their way into the training step."""
    samples = next(edge.src for edge in graph.inputs_of("train") if edge.carries == "samples")
    correct = Correct(
        name="correct",
        loop="rl",
        group=graph.task("advantage").group,
        method=job.precision.correction,
        clip_high=job.precision.correction_clip,
        clip_low=1.0 / job.precision.correction_clip if job.precision.correction == "mis" else 0.0,
    )
    return graph.with_tasks(
        [correct],
        [
            Edge(src=samples, dst="correct", carries="samples"),
            Edge(src="old_log_probs", dst="correct", carries="log_probs"),
            Edge(src="correct", dst="train", carries="importance_weights"),
        ],
    )


def _with_quantization(graph: TaskGraph, target: str) -> TaskGraph:
    """Weights are quantised on the trainer's side, between the training step and the sync."""
    quantize = Quantize(name="quantize", loop="rl", group=graph.task("train").group, target=target)
    into_sync = [edge for edge in graph.inputs_of("weight_sync") if edge.carries == "weights"]
    moved = [replace(edge, dst="quantize") for edge in into_sync]
    rerouted = graph.without_edges(into_sync).with_tasks([quantize], moved)
    return rerouted.with_edges([Edge(src="quantize", dst="weight_sync", carries="weights")])


def numerics_table(ctx: PassContext, alignment: Alignment) -> Iterator[NumericsRow]:
    """Every op that touches a log-prob: what each side runs, and the verdict."""
    job = ctx.job
    shared = alignment == "exact"
    train, rollout = job.precision.train, job.precision.rollout
    kernels = {"torch": "miles_plan.kernels", "megatron": "Transformer Engine", "fsdp2": "PyTorch", "sglang": "SGLang"}
    sides = ("miles_plan.kernels", "miles_plan.kernels") if shared else (kernels[job.train.engine], kernels[job.rollout.engine])

    def row(op: str, detail: str, *, left: str = train, right: str = rollout) -> NumericsRow:
        detail = detail if shared else ""  # the order of sums inside other libraries' kernels is theirs to change
        one, other = f"{sides[0]} {left} {detail}".rstrip(), f"{sides[1]} {right} {detail}".rstrip()
        if shared:
            return NumericsRow(
                op=op, train=one, rollout=other, verdict="same", reason="one batch-invariant kernel on both sides"
            )
        if alignment == "corrected":
            return NumericsRow(
                op=op, train=one, rollout=other, verdict="corrected", reason=f"{job.precision.correction} weights"
            )
        return NumericsRow(op=op, train=one, rollout=other, verdict="accepted", reason="reported each step")

    yield row("embedding", "gather")
    yield row("rms_norm", "fp32 statistics")
    yield row("qkv, gate_up matmul", "chain over K")
    yield row("o_proj, down_proj matmul", "tree over K")
    yield row("rope", "fp32 tables")
    kv_cache = rollout if job.precision.kv_cache == "auto" else job.precision.kv_cache
    yield row("attention", "", left=f"{train} keys", right=f"{kv_cache} KV cache")
    if ctx.model.moe is not None:
        yield _routing_row(sides, alignment)
        yield row("expert matmul", "chain over K")
        yield row("expert combine", "slot order")
    yield row("lm_head, log_softmax", "fp32 log-prob")
    both = f"temperature {job.rollout.temperature:g}"
    yield NumericsRow(op="temperature", train=both, rollout=both, verdict="same", reason="one spec field sets both")
    yield _truncation_row(job)


def _routing_row(sides: tuple[str, str], alignment: Alignment) -> NumericsRow:
    if alignment in ("exact", "replay"):
        return NumericsRow(
            op="router",
            train="replayed expert ids",
            rollout=f"{sides[1]} top-k",
            verdict="replayed",
            reason="R3: ids travel with samples",
        )
    verdict: Literal["corrected", "accepted"] = "corrected" if alignment == "corrected" else "accepted"
    return NumericsRow(
        op="router", train=f"{sides[0]} top-k", rollout=f"{sides[1]} top-k", verdict=verdict, reason="not replayed"
    )


def _truncation_row(job: JobSpec) -> NumericsRow:
    cut = job.rollout.top_p < 1.0 or job.rollout.top_k > 0
    rollout = f"top_p {job.rollout.top_p:g}, top_k {job.rollout.top_k}" if cut else "whole vocabulary"
    return NumericsRow(
        op="top_p, top_k",
        train="whole vocabulary",
        rollout=rollout,
        verdict="accepted" if cut else "same",
        reason="log-probs are of the untruncated distribution on both sides" if cut else "no truncation",
    )


def _environment(job: JobSpec, alignment: Alignment) -> Iterator[tuple[str, str]]:
    """What exactness needs of the processes."""
    if alignment == "exact" and job.rollout.engine == "sglang":
        yield "env:NCCL_ALGO", "Ring"
        yield "env:NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0"
