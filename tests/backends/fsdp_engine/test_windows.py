"""Models whose layers see a window, or cap their scores, train as transformers computes them one sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from miles_plan.backends.fsdp_engine.options import FsdpEngineOptions
from miles_plan.backends.fsdp_engine.train_engine import FsdpTrainEngine
from miles_plan.data.batch import SampleBatch
from tests.backends.sample_trainers import SIZES, in_batch_order, random_batch, step

WINDOWED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
CONFIGS = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0, **WINDOWED},
    "mistral": {"sliding_window": 4},
    "gemma2": {**WINDOWED, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
}


def one_by_one(model: torch.nn.Module, batch: SampleBatch) -> np.ndarray:
    """Log-probs of the batch's answers in its order."""
    found = []
    for sample in range(batch.num_samples):
        start, length, prompt = (int(each[sample]) for each in (batch.start, batch.length, batch.prompt_length))
        tokens = torch.from_numpy(batch.tokens[start : start + length].astype(np.int64))
        with torch.no_grad():
            scores = model(tokens[None, :-1]).logits[0].float().log_softmax(-1)
        found.append(scores.gather(1, tokens[1:, None]).squeeze(1)[prompt - 1 :].numpy())
    return np.concatenate(found)


@pytest.mark.parametrize("kind", CONFIGS)
def test_windows_and_capped_scores_are_transformers_own(kind, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **CONFIGS[kind]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    engine = FsdpTrainEngine(
        FsdpEngineOptions(
            model_directory=tmp_path / "model", host_directory=tmp_path, dtype="float32", device="cpu", micro_batch_tokens=40
        )
    )
    batch = random_batch()
    scored = engine.log_probs(batch, model="policy", temperature=1.0, replay_routing=False)
    np.testing.assert_allclose(in_batch_order(batch, [scored])[0], one_by_one(model.eval(), batch), atol=2e-5)
    assert step(engine, 0)["grad_norm"] > 0
    engine.close()
