"""What a plan asks of the FSDP2 trainer that it cannot do: said before anything starts."""

from __future__ import annotations

from collections.abc import Iterator

from miles_plan.backends.fsdp_engine.options import layout_problems
from miles_plan.backends.training.from_plan import TrainerFacts, trainer_facts
from miles_plan.diagnostics import Diagnostic, error
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.plan import Plan


def problems(plan: Plan, group: DeviceGroup) -> Iterator[Diagnostic]:
    """Findings about one train group; imports nothing heavy."""
    facts = trainer_facts(plan, group)
    for text in layout_problems(facts.layout):
        help_ = "set train.layout to dp alone, or train.engine: megatron"
        yield error("MP444", f"@{group.name} trains with FSDP2: {text}", field="train.layout", help=help_)
    for text in _wishes(facts, plan.run.train_dtype):
        yield error("MP444", f"@{group.name} trains with FSDP2: {text}", field="train", help="use train.engine: megatron")


def _wishes(facts: TrainerFacts, dtype: str) -> Iterator[str]:
    if facts.dtype is None or facts.fp8:
        yield f"it cannot train in {dtype} (allowed: bf16, fp32)"
    if facts.exact:
        yield "alignment: exact; transformers' own layers do not give the rollout's bits"
    if facts.draft:
        yield "a speculative draft is trained by the torch engine only"
    if facts.teacher:
        yield "a teacher model: the plan's executor gives it no second checkpoint"
