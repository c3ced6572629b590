"""From a plan's groups to engines: the options of each rank, and the function that makes it inside its actor."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from miles_plan.backends.engine import RolloutEngine, TrainEngine
from miles_plan.backends.executor.dataflow import tasks_of
from miles_plan.backends.executor.engines import RolloutRank, TrainRank
from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.layout import Recompute
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import DraftStep, Logprobs, Rollout, TrainStep

DTYPES: dict[str, Literal["float32", "bfloat16"]] = {"fp32": "float32", "bf16": "bfloat16"}
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
DEFAULT_MICRO_BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """What engines need of the machine: the initial model, folders for offloaded parts, rendezvous files and engines' output,
    and a free port on the loopback device where the trainer's ranks meet."""

    model: Path
    parked: Path
    rendezvous: Path
    logs: Path
    port: int = 0


def launch_rank(plan: Plan, group: DeviceGroup, places: Places, rank: int) -> Any:
    """Whatever of a rank's engine can begin before the initial weights are there and the GPU is free; returns at once."""
    if group.engine != "sglang":
        return None
    from miles_plan.backends.sglang_engine.factory import launch_engine

    return launch_engine(
        plan, group, model_directory=places.model, rank=rank, rendezvous=places.rendezvous, log_directory=places.logs
    )


def import_engines(engines: Sequence[str]) -> None:
    """Load what these engines need while others are busy with something else. What is missing is named when it is used."""
    for name in [module for engine in engines for module in MODULES[engine]]:
        with contextlib.suppress(Exception):  # a library that lacks another may raise anything
            importlib.import_module(name)


def make_train_rank(
    launched: None, plan: Plan, group: DeviceGroup, places: Places, rank: int, threads: int, version: int
) -> TrainRank:
    """One rank of a trainer, in the process that calls this. Collective over the group."""
    return TrainRank(TRAINERS[group.engine](plan, group, places, rank, threads), rank, version)


def make_rollout_rank(launched: Any, plan: Plan, group: DeviceGroup, places: Places, rank: int, threads: int) -> RolloutRank:
    """One rank of a rollout engine, in the process that calls this. Collective over the engine's ranks.

    launched: what `launch_rank` gave this rank.
    """
    layout = group.rollout_layout
    assert layout is not None, "a rollout group has a rollout layout"
    index, rank_in_engine = divmod(rank, layout.gpus_per_engine)
    engine = ROLLOUT_ENGINES[group.engine](launched, plan, group, places, rank, threads)
    return RolloutRank(engine, index, layout.engines, rank_in_engine)


def torch_trainer(plan: Plan, group: DeviceGroup, places: Places, rank: int, threads: int) -> TrainEngine:
    """The embedded trainer."""
    import torch

    from miles_plan.backends.torch_engine.options import TrainEngineOptions
    from miles_plan.backends.torch_engine.train_engine import TorchTrainEngine

    torch.set_num_threads(threads)
    assert group.train_layout is not None, "a train group has a train layout"
    models = {task.model for task in tasks_of(plan.graph, Logprobs)}
    options = TrainEngineOptions(
        model_directory=places.model,
        host_directory=places.parked / group.name,
        layout=group.train_layout,
        dtype=DTYPES[plan.run.train_dtype],
        micro_batch_tokens=micro_batch_tokens(plan.graph),
        recompute=strongest_recompute(plan.graph),
        keep_reference="reference" in models,
        draft=bool(tasks_of(plan.graph, DraftStep)),
        device=_device(plan),
        seed=plan.run.seed,
    )
    return TorchTrainEngine(options, rank=rank, rendezvous=_rendezvous(places, group, group.train_layout.world_size))


def megatron_trainer(plan: Plan, group: DeviceGroup, places: Places, rank: int, threads: int) -> TrainEngine:
    """Megatron-core."""
    from miles_plan.backends.megatron_engine.factory import make_engine

    return make_engine(plan, group, **_trainer_arguments(places, group, rank, threads))


def fsdp_trainer(plan: Plan, group: DeviceGroup, places: Places, rank: int, threads: int) -> TrainEngine:
    """PyTorch FSDP2 around the transformers implementation."""
    from miles_plan.backends.fsdp_engine.factory import make_engine

    return make_engine(plan, group, **_trainer_arguments(places, group, rank, threads))


def _trainer_arguments(places: Places, group: DeviceGroup, rank: int, threads: int) -> dict[str, Any]:
    return {
        "model_directory": places.model,
        "host_directory": places.parked / group.name,
        "rank": rank,
        "master_address": "127.0.0.1",
        "master_port": places.port,
        "threads": threads,
    }


def torch_rollout_engine(
    launched: None, plan: Plan, group: DeviceGroup, places: Places, rank: int, threads: int
) -> RolloutEngine:
    """The embedded rollout engine."""
    import torch

    from miles_plan.backends.torch_engine.options import RolloutEngineOptions
    from miles_plan.backends.torch_engine.rollout_engine import TorchRolloutEngine

    torch.set_num_threads(threads)
    layout = group.rollout_layout
    assert layout is not None, "a rollout group has a rollout layout"
    task = rollout_of(plan.graph, group)
    index, rank_in_engine = divmod(rank, layout.gpus_per_engine)
    given: dict[str, Any] = {}
    if task is not None:
        given = {"page_tokens": task.page_tokens, "prefix_sharing": task.prefix_sharing, "return_routing": task.record_routing}
        given |= {name: size for name in ("kv_pool_tokens", "max_running") if (size := getattr(task, name))}
        given["draft_steps"] = task.speculation.steps if task.speculation is not None else 0
    options = RolloutEngineOptions(
        model_directory=places.model,
        layout=layout,
        dtype=DTYPES[plan.run.rollout_dtype],
        device=_device(plan),
        seed=plan.run.seed,
        **given,
    )
    rendezvous = _rendezvous(places, group, layout.gpus_per_engine, engine=index)
    return TorchRolloutEngine(options, rank=rank_in_engine, rendezvous=rendezvous)


def sglang_engine(launched: Any, plan: Plan, group: DeviceGroup, places: Places, rank: int, threads: int) -> Any:
    """SGLang: the first rank of an engine starts it on the GPUs of all of them."""
    from miles_plan.backends.sglang_engine.factory import make_engine

    return make_engine(plan, launched, model_directory=places.model)


TRAINERS: dict[str, Callable[..., TrainEngine]] = {
    "torch": torch_trainer,
    "megatron": megatron_trainer,
    "fsdp2": fsdp_trainer,
}
ROLLOUT_ENGINES: dict[str, Callable[..., Any]] = {"torch": torch_rollout_engine, "sglang": sglang_engine}
MODULES: dict[str, tuple[str, ...]] = {
    "torch": ("miles_plan.backends.torch_engine.rollout_engine", "miles_plan.backends.torch_engine.train_engine"),
    "megatron": (
        "miles_plan.backends.megatron_engine.train_engine",
        "miles_plan.backends.megatron_engine.model",
        "megatron.core.models.gpt.gpt_layer_specs",  # imports Transformer Engine where there is one
        "megatron.core.optimizer",
    ),
    "fsdp2": ("miles_plan.backends.fsdp_engine.train_engine", "torch.distributed.fsdp", "transformers.modeling_utils"),
    "sglang": ("miles_plan.backends.sglang_engine.factory",),
}
FACTORIES: dict[str, Callable[..., Any]] = {"train": make_train_rank, "rollout": make_rollout_rank}


def micro_batch_tokens(graph: TaskGraph) -> int:
    """The tightest token budget that a task of the trainer states."""
    stated = [each.tokens_per_gpu for each in tasks_of(graph, TrainStep)] + [
        each.tokens_per_gpu for each in tasks_of(graph, Logprobs)
    ]
    return min((tokens for tokens in stated if tokens), default=DEFAULT_MICRO_BATCH_TOKENS)


def strongest_recompute(graph: TaskGraph) -> Recompute:
    """The most that any training step recomputes: the engine is built once for all of them."""
    return max(
        (task.recompute for task in tasks_of(graph, TrainStep)),
        key=RECOMPUTE.index,
        default="none",
    )


def rollout_of(graph: TaskGraph, group: DeviceGroup) -> Rollout | None:
    """The rollout that runs on a group, None where it only evaluates."""
    return next((task for task in tasks_of(graph, Rollout) if task.group == group.name), None)


def _device(plan: Plan) -> str:
    return "cpu" if plan.cluster.gpu == "cpu" else "cuda"


def _rendezvous(places: Places, group: DeviceGroup, ranks: int, engine: int = 0) -> str | None:
    """A file that the ranks meet at; a fresh folder for each time engines are built."""
    return None if ranks == 1 else f"file://{places.rendezvous / f'{group.name}-{engine}'}"
