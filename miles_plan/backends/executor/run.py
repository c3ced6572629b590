"""Run a plan, or continue a run: everything from the lock on the folder to the summary at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miles_plan import __version__
from miles_plan.backends.executor.checkpoints import sweep
from miles_plan.backends.executor.cluster import Session, start_session
from miles_plan.backends.executor.crew import Crew, threads_of_rank
from miles_plan.backends.executor.dataflow import Dataflow
from miles_plan.backends.executor.durable_files import write_json
from miles_plan.backends.executor.execution import Execution
from miles_plan.backends.executor.failures import Ending, InterruptedRunError, RunError
from miles_plan.backends.executor.host import model_config
from miles_plan.backends.executor.initial_model import begin_initial_model
from miles_plan.backends.executor.janitor import Belongings, clean_up
from miles_plan.backends.executor.metrics import read_metrics
from miles_plan.backends.executor.operations.operation import Services
from miles_plan.backends.executor.preflight import preflight
from miles_plan.backends.executor.progress import Progress, progress_for
from miles_plan.backends.executor.run_directory import RunDirectory, RunDirectoryError
from miles_plan.backends.executor.run_log import RunLog
from miles_plan.backends.executor.setup_steps import Exported
from miles_plan.backends.executor.stop import StopRequest
from miles_plan.backends.executor.summary import run_summary
from miles_plan.diagnostics import PlanError
from miles_plan.ir.plan import Plan, plan_sha256, read_plan, write_plan


@dataclass(frozen=True, slots=True)
class Result:
    """A run that reached its end: the plan's name, its folder and its summary."""

    name: str
    directory: RunDirectory
    summary: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the first start fixed: epoch, seconds since 1970 at which the run began; threads of each rank."""

    epoch: float
    threads: int
    plan_sha256: str
    tool_version: str


def execute(plan: Plan, root: Path, *, progress: Progress | None = None) -> Result:
    """Run a plan in a new folder.

    PlanError for a plan that this executor cannot run or data it cannot read, before anything starts; RunError when the run
    fails, InterruptedRunError when it was asked to stop; RunDirectoryError for a folder that is in use or holds a run.
    """
    directory = RunDirectory(root)
    if not directory.is_fresh():
        raise RunDirectoryError(f"{root} holds a run already: `miles-plan resume {root}` continues it")
    with _disk_errors(root):
        made = directory.make()
        with directory.locked():
            if findings := preflight(plan, directory):
                directory.unmake(made)
                raise PlanError(tuple(findings))
            write_plan(plan, directory.plan)
            settings = Settings(
                epoch=time.time(), threads=threads_of_rank(plan), plan_sha256=plan_sha256(plan), tool_version=__version__
            )
            write_json(directory.settings, asdict(settings))
            return _carry_out(plan, directory, settings, progress)


def resume(root: Path, *, progress: Progress | None = None) -> Result:
    """Continue a run after any end. The folder's own plan is what runs. A finished run is only reported again.

    RunDirectoryError for a folder that holds no run or is in use; else as `execute`.
    """
    directory = RunDirectory(root)
    if not directory.plan.exists() or not directory.settings.exists():
        raise RunDirectoryError(f"{root} holds no run: there is no plan.json and run.json in it")
    with _disk_errors(root), directory.locked() as left_behind:
        plan = read_plan(directory.plan)
        settings = Settings(**json.loads(directory.settings.read_text(encoding="utf-8")))
        if settings.plan_sha256 != plan_sha256(plan):
            raise RunDirectoryError(f"{directory.plan} is not the plan that this run began with")
        if directory.summary.exists() and directory.final.exists():
            return Result(plan.name, directory, json.loads(directory.summary.read_text(encoding="utf-8")))
        removed = _clean_up_after(left_behind) + sweep(directory.checkpoints)
        return _carry_out(plan, directory, settings, progress, removed=removed)


def _carry_out(
    plan: Plan, directory: RunDirectory, settings: Settings, progress: Progress | None, *, removed: list[str] | None = None
) -> Result:
    """One session: Ray, engines, the graph, the summary."""
    flow = Dataflow(plan.graph)
    log = RunLog.open(
        flow, directory, progress or progress_for(plan.graph.loops), epoch=settings.epoch, tensorboard=plan.run.tensorboard
    )
    ending: Ending = "failed"
    session_number = log.journal.begin_session(os.getpid())
    log.event("run_started" if session_number == 1 else "run_resumed", "run", plan.name, session=session_number)
    if removed:
        log.event("cleaned_up", "run", "what the last session left behind", removed=removed)
    try:
        exported = _in_session(plan, directory, settings, flow, log)
        ending = "finished"
        return Result(plan.name, directory, _finish(plan, directory, log, exported))
    except (InterruptedRunError, KeyboardInterrupt):
        ending = "interrupted"
        raise
    except RunError as error:
        log.event("run_failed", "run", error.diagnostic.message, code=error.diagnostic.code)
        raise
    finally:
        with contextlib.suppress(OSError):
            log.journal.end_session(ending)
            log.event("run_finished", "run", ending)
        log.close()


def _in_session(plan: Plan, directory: RunDirectory, settings: Settings, flow: Dataflow, log: RunLog) -> Exported:
    stop, model_folder = StopRequest(), directory.root / "initial"
    with stop.installed(), _session(plan, directory, log, model_folder) as (session, model_process):
        stop.count_from_now(lambda: _end_at_once(session.belongings))
        crew = Crew(
            plan=plan,
            session=session,
            model_folder=model_folder,
            model_process=model_process,
            event=log.event,
            data_folder=directory.data,
            logs_folder=directory.logs,
            threads=settings.threads,
            config=model_config(plan),
        )
        services = Services(
            plan=plan,
            plan_sha256=settings.plan_sha256,
            flow=flow,
            members=crew.members,
            host=crew.host,
            end_token=0,
            directory=directory,
            event=log.event,
            journal_row=log.journal.position,
            unwritten_metrics=log.metrics.unwritten,
        )
        return Execution(services, crew, log, stop, plan.run.max_restarts).run()


@contextlib.contextmanager
def _session(plan: Plan, directory: RunDirectory, log: RunLog, model_folder: Path) -> Iterator[tuple[Session, int | None]]:
    """Ray for as long as the block runs, and the process that makes the initial weights meanwhile.

    The lock file says what to clean up if this process dies in it.
    """
    model_process = None

    def while_ray_starts(belongings: Belongings) -> None:
        nonlocal model_process
        directory.write_owner({"belongings": asdict(belongings)})
        model_process = begin_initial_model(plan, directory.plan, model_folder)

    session = start_session(plan, while_ray_starts)
    log.event("cluster_started", "run", "ray", seconds=round(session.started_s, 2))
    try:
        yield session, model_process
    except RunError:
        _keep_logs(session, directory)
        raise
    finally:
        if left := session.close():
            log.event("cleaned_up", "run", "processes that outlived Ray", removed=left)


def _finish(plan: Plan, directory: RunDirectory, log: RunLog, exported: Exported) -> Mapping[str, Any]:
    """The summary, written last: a folder that has one holds a finished run."""
    restarts = len(log.events.earlier("run_resumed")) + sum(
        event["action"] != "stop" for event in log.events.earlier("task_failed")
    )
    summary = run_summary(
        plan,
        read_metrics(directory.metrics),
        wall_s=log.journal.seconds_so_far(),
        restarts=restarts,
        final_weights_sha256=exported.weights_sha256,
        details={
            "sessions": len(log.journal.sessions()),
            "digests_differ": log.digests_differ,
            "finished": True,
            "start_s": {step["subject"]: step["seconds"] for step in log.events.earlier("start_step")},
        },
    )
    write_json(directory.summary, summary)
    return summary


def _clean_up_after(left_behind: Mapping[str, Any] | None) -> list[str]:
    """What a killed driver left, unless its janitor was faster."""
    belongings = (left_behind or {}).get("belongings")
    return clean_up(Belongings(**belongings)) if belongings else []


def _end_at_once(belongings: Belongings) -> None:
    """The second Ctrl-C: no farewells. The checkpoints on disk are whole, whatever was going on."""
    clean_up(belongings)


def _keep_logs(session: Session, directory: RunDirectory) -> None:
    """What the actors wrote, for whoever looks for the cause."""
    for path in Path(session.belongings.temporary).glob("session_latest/logs/worker-*"):
        if path.stat().st_size:
            directory.logs.mkdir(exist_ok=True)
            shutil.copyfile(path, directory.logs / path.name)


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    """A full disk, or a folder that is gone, is a finding that names the path."""
    try:
        yield
    except OSError as error:
        where = error.filename or root
        raise RunError(
            "MP508",
            f"{where}: {error.strerror or error}",
            help="free space or mend the path, then continue with `miles-plan resume`",
        ) from error
