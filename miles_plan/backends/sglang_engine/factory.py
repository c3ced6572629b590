"""An engine's ranks in the executor's processes, one a GPU: they tell each other their GPUs, and the first starts SGLang."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from miles_plan.backends.engine import EngineError
from miles_plan.backends.sglang_engine.generation import Routed
from miles_plan.backends.sglang_engine.rollout_engine import SglangFollower, SglangOptions, SglangRolloutEngine
from miles_plan.backends.sglang_engine.server_arguments import server_arguments
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import RecordRouting

MEETING_S = 120.0
_POLL_S = 0.05


def make_engine(
    plan: Plan, group: DeviceGroup, *, model_directory: Path, rank: int, rendezvous: Path, log_directory: Path
) -> SglangRolloutEngine | SglangFollower:
    """The rank's part of its engine. rendezvous: a fresh folder that all ranks see. EngineError when it does not start."""
    layout = group.rollout_layout
    assert layout is not None, "a rollout group has a rollout layout"
    index, rank_in_engine = divmod(rank, layout.gpus_per_engine)
    _announce(rendezvous, group.name, rank)
    if rank_in_engine:
        return SglangFollower()
    ranks = range(rank, rank + layout.gpus_per_engine)
    name = f"sglang @{group.name}" + (f" engine {index}" if layout.engines > 1 else "")
    config = json.loads((model_directory / "config.json").read_text(encoding="utf-8"))
    options = SglangOptions(
        arguments=server_arguments(plan, group, model_directory=model_directory),
        gpus=tuple(_gpus(rendezvous, group.name, ranks)),
        log=log_directory / f"sglang-{group.name}-{index}.log",
        vocab_size=int(config["vocab_size"]),
        max_positions=int(config["max_position_embeddings"]),
        routed=routed_of(plan, int(config["num_hidden_layers"])),
        name=name,
    )
    log_directory.mkdir(parents=True, exist_ok=True)
    (log_directory / f"sglang-{group.name}-{index}.arguments").write_text(f"{options.arguments}\n", encoding="utf-8")
    return SglangRolloutEngine(options)


def routed_of(plan: Plan, num_layers: int) -> Routed | None:
    """What of the experts the plan records, None where it records nothing."""
    task = next((task for task in plan.graph.tasks if isinstance(task, RecordRouting)), None)
    if task is None:
        return None
    return Routed(layers=task.moe_layers, num_layers=num_layers, num_experts=task.num_experts, topk=task.topk)


def _announce(rendezvous: Path, group: str, rank: int) -> None:
    """Write down which GPU this rank has, in one step."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    aside = rendezvous / f".{group}-gpu-{rank}"
    aside.write_text(gpu, encoding="ascii")
    os.replace(aside, rendezvous / f"{group}-gpu-{rank}")


def _gpus(rendezvous: Path, group: str, ranks: Sequence[int]) -> list[str]:
    """The GPUs of these ranks. EngineError naming the rank that does not come."""
    found: list[str] = []
    deadline = time.monotonic() + MEETING_S
    for rank in ranks:
        path = rendezvous / f"{group}-gpu-{rank}"
        while not path.exists():
            if time.monotonic() > deadline:
                raise EngineError(f"sglang @{group}: rank {rank} has not said which GPU it has, after {MEETING_S:.0f} s")
            time.sleep(_POLL_S)
        found.append(path.read_text(encoding="ascii"))
    return found
