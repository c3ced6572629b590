"""One rank of a plan's Megatron trainer."""

from __future__ import annotations

from pathlib import Path

from miles_plan.backends.engine import EngineError, TrainEngine
from miles_plan.backends.megatron_engine.options import LayerSpec, MegatronEngineOptions
from miles_plan.backends.training.from_plan import TrainerFacts, trainer_facts
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.plan import Plan


def make_engine(
    plan: Plan,
    group: DeviceGroup,
    *,
    model_directory: Path,
    host_directory: Path,
    rank: int,
    master_address: str,
    master_port: int,
    threads: int,
) -> TrainEngine:
    """Build rank `rank` in this process, on its current GPU; collective over the group, which meets at the master's port."""
    import torch

    from miles_plan.backends.megatron_engine.train_engine import MegatronTrainEngine

    torch.set_num_threads(threads)
    facts = trainer_facts(plan, group)
    if facts.dtype is None:
        raise EngineError(f"megatron train engine: it cannot train in {plan.run.train_dtype}")
    options = MegatronEngineOptions(
        model_directory=model_directory,
        host_directory=host_directory,
        layout=facts.layout,
        dtype=facts.dtype,
        micro_batch_tokens=facts.micro_batch_tokens * facts.layout.cp,
        recompute=facts.recompute,
        fp8=facts.fp8,
        layer_spec=layers_of(facts),
        keep_reference=facts.keep_reference,
        reference_offload=facts.device == "cuda",
        optimizer_offload=facts.optimizer_offload,
        device=facts.device,
        seed=facts.seed,
    )
    return MegatronTrainEngine(options, rank=rank, rendezvous=f"tcp://{master_address}:{master_port}")


def layers_of(facts: TrainerFacts) -> LayerSpec:
    """Our kernels where the plan promises the rollout's bits, else Transformer Engine; torch's own layers on a CPU."""
    if facts.device == "cpu":
        return "local"
    return "batch_invariant" if facts.exact else "transformer_engine"
