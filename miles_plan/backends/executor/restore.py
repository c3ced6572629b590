"""Where a run starts from: engines are built, and the newest good checkpoint is loaded into them, if there is one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from miles_plan.backends.engine import WeightBucket
from miles_plan.backends.executor.checkpoints import Manifest, Refusal, newest_good
from miles_plan.backends.executor.crew import Crew
from miles_plan.backends.executor.dataflow import Done, Instance, tasks_of
from miles_plan.backends.executor.engines import TrainRank
from miles_plan.backends.executor.failures import RunError
from miles_plan.backends.executor.host import HostTasks
from miles_plan.backends.executor.operations.operation import Context, Services, Wait, Waiting, places
from miles_plan.backends.executor.operations.publish import publish
from miles_plan.backends.executor.run_log import RunLog
from miles_plan.backends.executor.run_state import Publication, RunState, publishes, still_wanted
from miles_plan.backends.executor.weight_files import load_buckets
from miles_plan.ir.tasks import TrainStep


@dataclass(frozen=True, slots=True)
class Restored:
    """Where the run stands. loop: the one it is in, None before the first; manifest: of the checkpoint, None at the start."""

    services: Services
    done: Mapping[str, int]
    state: RunState
    loop: str | None
    manifest: Manifest | None


def load_rank(rank: TrainRank, folder: Path, version: int) -> None:
    """Load this rank's files."""
    rank.engine.load(folder)
    rank.version = version


def end_token_of(host: HostTasks) -> int:
    """What ends a response."""
    return host.tokenizer.eos_token_id


def restore(services: Services, crew: Crew, log: RunLog) -> Waiting[Restored]:
    """Build the crew and load the newest good checkpoint. RunError (MP505) where there was one and none can be used."""
    began = time.monotonic()
    crew.start()  # its processes come up while files are hashed
    folder, manifest, refusals = newest_good(services.directory.checkpoints, services.plan_sha256)
    for refusal in refusals:
        log.event("checkpoint_refused", "restore", str(refusal.path), reason=refusal.reason)
    if manifest is None:
        _refuse_to_start_over(log, refusals)
    yield from crew.build(0)
    (end_token,) = yield Wait("host: the end token", crew.host.call(end_token_of))
    log.event(
        "actors_started",
        "restore",
        f"{len(crew.gpus)} GPU processes and the host's",
        seconds=_since(began),
        pids=dict(crew.pids),
    )
    services = replace(services, end_token=end_token)
    if manifest is None or folder is None:
        return Restored(services, services.flow.start(), RunState(), None, None)
    trainer = crew.members[next(group.name for group in services.flow.graph.groups if group.role == "train")]
    began = time.monotonic()
    yield Wait(f"{places(trainer)}: load {folder.name}", trainer.call(load_rank, folder, manifest.weight_version))
    about = {"loop": manifest.loop, "iteration": manifest.iteration}
    log.event("checkpoint_loaded", "restore", folder.name, seconds=_since(began), **about)
    state = RunState(
        trainer_version=manifest.weight_version,
        published=_older_weights(folder, manifest, trainer.slot, Path(crew.session.belongings.temporary)),
        weights_made={Instance.parse(made): version for made, version in manifest.weights_made.items()},
        cursors={Instance.parse(made): rows for made, rows in manifest.cursors.items()},
        saved=dict(manifest.done),
    )
    yield from _publish_again(services, manifest.done, state)
    return Restored(services, manifest.done, state, manifest.loop, manifest)


def _since(began: float) -> float:
    """Seconds since a time of `time.monotonic`."""
    return round(time.monotonic() - began, 2)


def _publish_again(services: Services, done: Done, state: RunState) -> Waiting[None]:
    """The loaded weights, where the training step that made them had to publish them before the next one."""
    graph = services.flow.graph
    publishing = any(publishes(graph, task.name) for task in tasks_of(graph, TrainStep))
    if publishing and state.trainer_version in still_wanted(services.flow, done, state):
        context = Context(services=services, state=state, instance=Instance("restore", 0), inputs=(), done=done)
        yield from publish(context, state.trainer_version)


def _refuse_to_start_over(log: RunLog, refusals: Sequence[Refusal]) -> None:
    """Starting from scratch is right only where no checkpoint was ever finished."""
    written = log.events.earlier("checkpoint_written")
    if refusals or written:
        named = (
            "; ".join(f"{refusal.path}: {refusal.reason}" for refusal in refusals)
            or f"{len(written)} were written, none is there"
        )
        raise RunError(
            "MP505",
            f"no checkpoint can be used, and starting again from the first step is not what was asked for: {named}",
            help="put the checkpoint folder back from a copy, or run the plan again in a new folder",
            resumable=False,
        )


def _older_weights(folder: Path, manifest: Manifest, group: str, temporary: Path) -> dict[int, Publication]:
    """Weights that syncs to come still ask for, copied out of a checkpoint that may be deleted before they do."""
    found = {}
    for version, name in manifest.older_weights.items():
        copy = temporary / "weights" / name
        shutil.copytree(folder / name, copy, dirs_exist_ok=True)
        buckets: list[WeightBucket] = load_buckets(copy)
        found[int(version)] = Publication(group, buckets, sum(tensor.size_bytes for each in buckets for tensor in each.tensors))
    return found
