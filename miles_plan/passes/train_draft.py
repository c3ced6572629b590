"""Speculative rollout: a draft proposes tokens, the policy verifies them, and the draft learns online inside the step.

With per-token acceptance a and k draft steps one verification yields (1 - a^(k+1)) / (1 - a) tokens in expectation, the bonus
token included (Leviathan et al., arXiv 2211.17192, equation 1). Acceptance falls as the policy moves away from the draft, so
the draft is trained on the rollout's own tokens; embedding and head are shared with the policy and take no gradient from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from miles_plan.diagnostics import Diagnostic
from miles_plan.ir.graph import Fact, TaskGraph
from miles_plan.ir.plan import Decision, Estimate
from miles_plan.ir.tasks import Checkpoint, DraftStep, Edge, Rollout, Speculation, TrainStep, WeightSync
from miles_plan.passes.base import Outcome, Pass, PassContext
from miles_plan.spec.rollout import SpeculativeSpec

# Second-token acceptance of DeepSeek-V3's MTP layer is 0.85 to 0.90 on held-out text (arXiv 2412.19437, section 5.4.3). A draft
# that is not trained while the policy moves is given the width down to 0.6.
ACCEPTANCE_TRAINED = (0.75, 0.85, 0.90)
ACCEPTANCE_FROZEN = (0.60, 0.75, 0.90)


@dataclass(frozen=True)
class TrainDraft(Pass):
    """Insert the draft's training step and sync, and price the speed-up."""

    name: ClassVar[str] = "train_draft"
    needs: ClassVar[frozenset[Fact]] = frozenset({"placed"})

    def run(self, graph: TaskGraph, ctx: PassContext) -> Outcome:
        """Jobs without speculation pass through."""
        speculative = ctx.job.rollout.speculative
        if speculative == "off" or not graph.of_kind(Rollout):
            return Outcome(graph=graph)
        diagnostics = tuple(_misfits(graph, ctx, speculative))
        low, mid, high = ACCEPTANCE_TRAINED if speculative.train else ACCEPTANCE_FROZEN
        speculation = Speculation(
            method=speculative.method,
            steps=speculative.steps,
            topk=speculative.topk,
            draft_tokens=draft_tokens(speculative),
            accept_length=accept_length(mid, speculative.steps),
        )
        rollouts = [replace(task, speculation=speculation) for task in graph.tasks if isinstance(task, Rollout)]
        graph = graph.with_replaced(*rollouts)
        if speculative.train:
            graph = _with_draft_step(graph)
        return Outcome(
            graph=graph,
            diagnostics=diagnostics,
            decisions=(
                Decision(
                    field="rollout.speculative",
                    value=f"{speculative.method}, {speculative.steps} steps, {speculation.draft_tokens} tokens at once",
                    reason=f"about {speculation.accept_length:.2f} tokens a verification at acceptance {mid:g}",
                    by=self.name,
                ),
            ),
            estimates=(
                Estimate(
                    name="tokens per verification",
                    unit="tokens",
                    low=accept_length(low, speculative.steps),
                    mid=speculation.accept_length,
                    high=accept_length(high, speculative.steps),
                    basis="published acceptance, arXiv 2412.19437; equation 1 of arXiv 2211.17192",
                ),
            ),
        )


def accept_length(acceptance: float, steps: int) -> float:
    """Expected tokens of one verification of `steps` drafted tokens, each accepted with probability `acceptance`."""
    if acceptance >= 1.0:
        return float(steps + 1)
    return float((1.0 - acceptance ** (steps + 1)) / (1.0 - acceptance))


def draft_tokens(speculative: SpeculativeSpec) -> int:
    """Tokens verified at once: one branch needs its steps and the bonus token."""
    asked = speculative.draft_tokens
    return speculative.steps * speculative.topk + 1 if asked == "auto" else asked


def _with_draft_step(graph: TaskGraph) -> TaskGraph:
    """The draft trains on the same samples as the policy and travels with its weights."""
    train = graph.task("train")
    assert isinstance(train, TrainStep)
    samples = next(edge.src for edge in graph.inputs_of("train") if edge.carries == "samples")
    step = DraftStep(name="train_draft", loop="rl", group=train.group, optimizer=train.optimizer)
    syncs = [replace(task, draft=True) for task in graph.tasks if isinstance(task, WeightSync) and task.loop == "rl"]
    edges = [
        Edge(src=samples, dst="train_draft", carries="samples"),
        Edge(src="train", dst="train_draft", carries="weights"),
        Edge(src="train_draft", dst="weight_sync", carries="draft_weights", distance=1),
    ]
    # what a checkpoint saves of the draft belongs to the policy it saves
    saves = [task.name for task in graph.of_kind(Checkpoint) if task.loop == "rl"]
    edges += [Edge(src="train_draft", dst=name, carries="order") for name in saves]
    return graph.with_replaced(*syncs).with_tasks([step], edges)


def _torch_misfits(graph: TaskGraph, ctx: PassContext, speculative: SpeculativeSpec) -> Iterator[tuple[str, str, str]]:
    """What the embedded engines cannot do for a draft: the message, the field, the way out."""
    if speculative.method == "mtp":
        yield "a draft of the torch engines is not a layer of the model", "rollout.speculative.method", "use method: eagle"
    if speculative.topk > 1:
        yield (
            f"the torch rollout engine verifies one branch, not {speculative.topk}",
            "rollout.speculative.topk",
            "leave topk out, or use rollout.engine: sglang",
        )
    if not speculative.train:
        yield (
            "a draft of the torch engines begins with random weights and would keep them",
            "rollout.speculative",
            "add train: true",
        )
    layout = next((group.train_layout for group in graph.groups if group.role == "train"), None)
    if layout is not None and layout.pp > 1:
        yield (
            f"the torch trainer trains a draft without pipeline stages, the plan has {layout.pp}",
            "rollout.speculative",
            "set train.layout.pp: 1",
        )


def _misfits(graph: TaskGraph, ctx: PassContext, speculative: SpeculativeSpec) -> Iterator[Diagnostic]:
    if ctx.job.rollout.engine == "torch":
        for message, field, help_text in _torch_misfits(graph, ctx, speculative):
            yield ctx.error("MP410", message, field, help=help_text)
        return
    if speculative.method == "mtp" and not ctx.model.mtp_layers:
        yield ctx.error(
            "MP310",
            f"{ctx.model.name} has no multi-token-prediction layer",
            "rollout.speculative.method",
            help="use method: eagle, or a model with MTP layers",
        )
    if speculative.topk > 1 and draft_tokens(speculative) < speculative.steps + 1:
        yield ctx.error(
            "MP311",
            f"{draft_tokens(speculative)} draft tokens cannot hold {speculative.steps} steps and the bonus token",
            "rollout.speculative.draft_tokens",
            help=f"use at least {speculative.steps + 1}",
        )
