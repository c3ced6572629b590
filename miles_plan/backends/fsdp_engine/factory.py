"""One rank of a plan's FSDP2 trainer."""

from __future__ import annotations

from pathlib import Path

from miles_plan.backends.engine import EngineError, TrainEngine
from miles_plan.backends.fsdp_engine.options import FsdpEngineOptions
from miles_plan.backends.training.from_plan import trainer_facts
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

    from miles_plan.backends.fsdp_engine.train_engine import FsdpTrainEngine

    torch.set_num_threads(threads)
    facts = trainer_facts(plan, group)
    if facts.dtype is None or facts.fp8:
        raise EngineError(f"fsdp train engine: it cannot train in {plan.run.train_dtype}")
    options = FsdpEngineOptions(
        model_directory=model_directory,
        host_directory=host_directory,
        layout=facts.layout,
        dtype=facts.dtype,
        micro_batch_tokens=facts.micro_batch_tokens,
        recompute=facts.recompute,
        keep_reference=facts.keep_reference,
        reference_offload=facts.device == "cuda",
        optimizer_offload=facts.optimizer_offload,
        device=facts.device,
        seed=facts.seed,
    )
    return FsdpTrainEngine(options, rank=rank, rendezvous=f"tcp://{master_address}:{master_port}")
