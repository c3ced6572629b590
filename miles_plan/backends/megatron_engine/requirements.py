"""What a plan asks of the Megatron trainer that it cannot do, or not here: said before anything starts."""

from __future__ import annotations

from collections.abc import Iterator

from miles_plan.backends.megatron_engine.factory import layers_of
from miles_plan.backends.megatron_engine.layout_checks import layout_problems
from miles_plan.backends.megatron_engine.versions import KNOWN_TO_WORK, version_problems
from miles_plan.backends.training.from_plan import TrainerFacts, trainer_facts
from miles_plan.backends.training.plan_model import config_of_plan
from miles_plan.diagnostics import Diagnostic, error
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.plan import Plan


def problems(plan: Plan, group: DeviceGroup) -> Iterator[Diagnostic]:
    """Findings about one train group. Imports neither Megatron nor Transformer Engine."""
    facts = trainer_facts(plan, group)
    layers = layers_of(facts)
    pins = " ".join(f"{package}=={releases[0]}" for package, releases in KNOWN_TO_WORK.items())
    for text in version_problems(transformer_engine=layers == "transformer_engine"):
        if "not installed" in text:  # another release may work: `doctor` says which were seen to
            yield error(
                "MP444", f"@{group.name} trains with Megatron-core: {text}", field="train.engine", help=f"install {pins}"
            )
    for text in _wishes(facts, plan.run.train_dtype):
        yield error("MP444", f"@{group.name} trains with Megatron-core: {text}", field="train", help="use train.engine: torch")
    try:
        config = config_of_plan(plan)
    except (OSError, ValueError) as problem:
        yield error("MP444", f"@{group.name} trains with Megatron-core: {problem}", field="model")
        return
    for text in layout_problems(config, facts.layout, layers=layers):
        yield error("MP444", f"@{group.name} trains with Megatron-core: {text}", field="train.layout")


def _wishes(facts: TrainerFacts, dtype: str) -> Iterator[str]:
    if facts.dtype is None:
        yield f"it cannot train in {dtype} (allowed: bf16, fp32, fp8_blockwise)"
    if facts.fp8 and facts.exact:
        yield "fp8_blockwise with alignment: exact; our kernels train in bf16"
    if facts.draft:
        yield "a speculative draft is trained by the torch engine only"
    if facts.teacher:
        yield "a teacher model: the plan's executor gives it no second checkpoint"
