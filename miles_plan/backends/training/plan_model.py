"""The model of a plan, as the trainers' decoder configuration."""

from __future__ import annotations

from pathlib import Path

from miles_plan.backends.training.decoder_config import DecoderConfig, decoder_config, read_config
from miles_plan.ir.plan import Plan


def config_of_plan(plan: Plan) -> DecoderConfig:
    """From the checkpoint that the plan names or from its configuration. ValueError for a model that no trainer here runs."""
    from transformers import AutoConfig

    if plan.run.model.checkpoint is not None:
        return read_config(Path(plan.run.model.checkpoint))
    fields = dict(plan.run.model.hf_config or {})
    return decoder_config(AutoConfig.for_model(fields.pop("model_type", None), **fields))
