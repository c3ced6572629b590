"""Log-prob passes score the micro-batch with the most response tokens first: what its logits leave fits all that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles_plan.backends.fsdp_engine.options import FsdpEngineOptions
from miles_plan.backends.fsdp_engine.train_engine import FsdpTrainEngine
from miles_plan.backends.megatron_engine.options import MegatronEngineOptions
from miles_plan.backends.megatron_engine.train_engine import MegatronTrainEngine
from miles_plan.backends.torch_engine.weights import initialise_checkpoint
from miles_plan.backends.training.micro_batches import split_micro_batches
from tests.backends.megatron_engine import cuda_stand_ins
from tests.backends.sample_trainers import MODELS, random_batch

BUDGET_TOKENS = 24
ENGINES: dict[str, tuple[Any, Any]] = {
    "fsdp": (FsdpTrainEngine, FsdpEngineOptions), "megatron": (MegatronTrainEngine, MegatronEngineOptions),
}  # fmt: skip


@pytest.mark.parametrize("name", ENGINES)
def test_micro_batches_are_scored_in_shrinking_sizes(name: str, tmp_path: Path) -> None:
    if name == "megatron":
        cuda_stand_ins.need_megatron()
    make, options = ENGINES[name]
    initialise_checkpoint(MODELS["dense"], tmp_path / "model", seed=0)
    engine = make(
        options(
            model_directory=tmp_path / "model", host_directory=tmp_path, micro_batch_tokens=BUDGET_TOKENS, dtype="float32",
            device="cpu",
        )
    )  # fmt: skip
    batch = random_batch(samples=16, seed=3)
    scored = engine.log_probs(batch, model="policy", temperature=1.0, replay_routing=False)
    engine.close()
    answered = np.flatnonzero(batch.response_length > 0)
    parts = [answered[each] for each in split_micro_batches(batch.length[answered] - 1, budget_tokens=BUDGET_TOKENS)]
    sizes = [int(batch.response_length[part].sum()) for part in parts]
    assert sizes != sorted(sizes, reverse=True), "as they come they would grow"
    of = {int(sample): number for number, part in enumerate(parts) for sample in part}
    order = list(dict.fromkeys(of[int(sample)] for sample in scored.sample_index))
    assert len(order) == len(parts)
    assert [sizes[number] for number in order] == sorted(sizes, reverse=True)
