"""An engine's ranks in the executor's processes, one a GPU: they tell each other their GPUs, and the first starts SGLang.

The first rank launches the engine's process long before the engine may have its GPUs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from miles_plan.backends.engine import EngineError
from miles_plan.backends.sglang_engine.engine_link import EngineLink
from miles_plan.backends.sglang_engine.generation import Routed
from miles_plan.backends.sglang_engine.rollout_engine import SglangFollower, SglangOptions, SglangRolloutEngine, launch
from miles_plan.backends.sglang_engine.server_arguments import ServerArguments, server_arguments
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import RecordRouting

MEETING_S = 120.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Launched:
    """An engine's process that waits for its turn, and the GPUs that it will have."""

    link: EngineLink
    arguments: ServerArguments
    gpus: tuple[str, ...]

    def close(self) -> None:
        """End it."""
        self.link.close()


def launch_engine(
    plan: Plan, group: DeviceGroup, *, model_directory: Path, rank: int, rendezvous: Path, log_directory: Path
) -> Launched | None:
    """Launch the engine's process where this rank is its first; returns at once, and the model need not be there yet.

    rendezvous: a fresh folder that all ranks see.
    """
    layout = group.rollout_layout
    assert layout is not None, "a rollout group has a rollout layout"
    index, rank_in_engine = divmod(rank, layout.gpus_per_engine)
    _announce(rendezvous, group.name, rank)
    if rank_in_engine:
        return None
    arguments = server_arguments(plan, group, model_directory=model_directory)
    gpus = tuple(_gpus(rendezvous, group.name, range(rank, rank + layout.gpus_per_engine)))
    log_directory.mkdir(parents=True, exist_ok=True)
    (log_directory / f"sglang-{group.name}-{index}.arguments").write_text(f"{arguments}\n", encoding="utf-8")
    name = f"sglang @{group.name}" + (f" engine {index}" if layout.engines > 1 else "")
    log = log_directory / f"sglang-{group.name}-{index}.log"
    return Launched(launch(arguments, gpus=gpus, log=log, name=name, needed=model_directory / "config.json"), arguments, gpus)


def make_engine(plan: Plan, launched: Launched | None, *, model_directory: Path) -> SglangRolloutEngine | SglangFollower:
    """The rank's part of its engine, which may have its GPUs from now on. EngineError when it does not start."""
    if launched is None:
        return SglangFollower()
    config = json.loads((model_directory / "config.json").read_text(encoding="utf-8"))
    options = SglangOptions(
        arguments=launched.arguments,
        gpus=launched.gpus,
        log=launched.link.log,
        vocab_size=int(config["vocab_size"]),
        max_positions=int(config["max_position_embeddings"]),
        routed=routed_of(plan, int(config["num_hidden_layers"])),
        name=launched.link.name,
    )
    return SglangRolloutEngine(options, launched.link)


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
