"""The FSDP2 trainer on a real GPU: equal runs have equal bits, and many short sequences cost no more than few long ones."""

from __future__ import annotations

import pytest

from benchmarks.engines.trainers_on_gpus import Case, measure

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.mark.parametrize("model", ["small", "small_moe"])
def test_equal_runs_have_equal_bits(model):
    first, second = (measure(Case("fsdp", model, engine="fsdp"), 0, None) for _ in range(2))
    assert first["weights_sha256"] == second["weights_sha256"]
    assert first["steps"] == second["steps"]
    assert first["scores"] == second["scores"]


def test_short_sequences_take_the_time_of_their_tokens():
    answers = measure(Case("answers", "dense", engine="fsdp", batch="answers"), 0, None)
    full = measure(Case("full", "dense", engine="fsdp"), 0, None)
    tokens = {"answers": 256 * 17.5, "full": 16 * 2048.0}
    assert answers["step2_s"] / tokens["answers"] < 4 * full["step2_s"] / tokens["full"]
