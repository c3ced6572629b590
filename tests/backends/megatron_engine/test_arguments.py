"""What Megatron is told, as golden text, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miles_plan.backends.megatron_engine.arguments import derive_arguments
from miles_plan.backends.megatron_engine.layout_checks import layout_problems
from miles_plan.backends.megatron_engine.options import MegatronEngineOptions
from miles_plan.ir.layout import TrainLayout
from tests.backends.megatron_engine.test_weight_map import config_of

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense_gpu": ("dense", {"layout": TrainLayout(tp=2, sequence_parallel=True)}),
    "dense_cpu": ("tied", {"device": "cpu", "dtype": "float32"}),
    "moe_interleaved": ("moe_mixed", {"layout": TrainLayout(pp=2, vpp=2, dp=2, ep=2), "recompute": "full"}),
    "moe_fp8": ("moe", {"fp8": True, "recompute": "selective", "recompute_modules": ("moe", "core_attn")}),
    "dense_invariant": ("dense", {"layer_spec": "batch_invariant", "deterministic": True}),
}


def options_of(**given: Any) -> MegatronEngineOptions:
    return MegatronEngineOptions(model_directory=Path("model"), host_directory=Path("host"), **given)


@pytest.mark.parametrize("case", CASES)
def test_the_derived_arguments_are_as_reviewed(case, golden):
    model, given = CASES[case]
    golden.check(f"megatron_arguments/{case}.txt", derive_arguments(config_of(model), options_of(**given)).to_text())


REFUSED = {
    "tp=3 does not divide attention heads = 4": ("dense", TrainLayout(tp=3), "transformer_engine"),
    "tp=4 does not divide key-value heads = 2": ("dense", TrainLayout(tp=4), "transformer_engine"),
    "ep=16 does not divide experts = 8": ("moe", TrainLayout(dp=16, ep=16), "transformer_engine"),
    "tp=2 without sequence_parallel": ("moe", TrainLayout(tp=2), "transformer_engine"),
    "ep=2, etp=1 for a model without experts": ("dense", TrainLayout(dp=2, ep=2), "transformer_engine"),
    "4 layers leave some of 6 chunks empty": ("dense", TrainLayout(pp=3, vpp=2), "transformer_engine"),
    "stage_layers add up to 5, the model has 4": ("dense", TrainLayout(pp=2, stage_layers=(4, 1)), "transformer_engine"),
    "cp=2 with local layers": ("dense", TrainLayout(cp=2), "local"),
    "sequence_parallel with local layers": ("dense", TrainLayout(tp=2, sequence_parallel=True), "local"),
    "a vocabulary of 41 for the same bits": ("dense", TrainLayout(), "batch_invariant"),
    "etp=2 for the same bits": ("moe", TrainLayout(tp=2, etp=2, sequence_parallel=True), "batch_invariant"),
    "vpp=2 needs pp > 1": ("dense", TrainLayout(vpp=2), "transformer_engine"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_layout_that_cannot_run_is_refused_with_its_sizes(text, golden):
    model, layout, layers = REFUSED[text]
    assert any(text in problem for problem in layout_problems(config_of(model), layout, layers=layers))


def test_layouts_that_can_run_are_not_refused():
    for model, layout in (("dense", TrainLayout(tp=2, pp=2, vpp=2)), ("moe", TrainLayout(dp=4, ep=4, pp=2))):
        assert not list(layout_problems(config_of(model), layout))


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        options_of(micro_batch_tokens=0)
    with pytest.raises(ValueError, match=r"attention.*are not among core_attn"):
        options_of(recompute_modules=("attention",))
    with pytest.raises(ValueError, match="fp8 needs"):
        options_of(fp8=True, device="cpu")
