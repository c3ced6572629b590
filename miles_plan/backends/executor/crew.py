"""The actors of a run: one a GPU with a rank of every engine there, one for the host; made, replaced and let go."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from miles_plan.backends.engine import Part
from miles_plan.backends.executor.actors import Calls, Made, Members, start_actor
from miles_plan.backends.executor.cluster import Session, bundle, free_port
from miles_plan.backends.executor.dataflow import tasks_of
from miles_plan.backends.executor.engine_factories import FACTORIES, Places, import_engines, launch_rank
from miles_plan.backends.executor.host import open_host
from miles_plan.backends.executor.initial_model import finish_initial_model
from miles_plan.backends.executor.operations.operation import Wait, Waiting
from miles_plan.backends.executor.operations.residency import offload_rank, onload_rank
from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.group import DeviceGroup, GpuSpan
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import Offload

HOST = "host"


class PlacedGroup(NamedTuple):
    """A group that has GPUs."""

    name: str
    group: DeviceGroup
    gpus: GpuSpan


class Component(NamedTuple):
    """Groups that share GPUs, directly or through others, and the GPUs they hold; it is placed, and dies, as a whole."""

    groups: tuple[str, ...]
    gpus: tuple[int, ...]

    @property
    def name(self) -> str:
        """The groups' names."""
        return "+".join(self.groups)


@dataclass
class Crew:
    """Handles on all actors, and their process ids by place. model_process makes the initial weights meanwhile.

    event: writes an event down (kind, owner, subject, fields), here what each part of a start took. generation counts how often
    engines were built, so that ranks of two builds never meet.
    """

    plan: Plan
    session: Session
    model_folder: Path
    model_process: int | None
    event: Callable[..., None]
    data_folder: Path
    logs_folder: Path
    threads: int
    config: Mapping[str, Any]
    gpus: dict[int, Any] = field(default_factory=dict)
    host: Members = field(default_factory=lambda: Members(HOST, [], [HOST]))
    members: dict[str, Members] = field(default_factory=dict)
    generation: int = 0
    pids: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Handles on groups, with nobody behind them yet."""
        for group in self.groups:
            self.members[group.name] = Members(
                group.name, [], [f"@{group.name} rank {rank}" for rank in range(group.gpus.count)]
            )

    @property
    def groups(self) -> list[PlacedGroup]:
        """The plan's groups that have GPUs."""
        return [PlacedGroup(group.name, group, group.gpus) for group in self.plan.graph.groups if group.gpus is not None]

    def start(self) -> None:
        """Start an actor on every GPU in use that has none, and the host's. They come up while the driver goes on."""
        wanted = bundle(self.plan.cluster)
        missing = [each for each in gpu_components(self.plan.graph) if not set(each.gpus) <= set(self.gpus)]
        placements = self.session.place({each.name: [wanted] * len(each.gpus) for each in missing})
        for each in missing:
            for index, gpu in enumerate(each.gpus):
                self.gpus[gpu] = start_actor(
                    f"gpu-{gpu}", threads=self.threads, resources=dict(wanted), placement=placements[each.name], bundle=index
                )
        for group in self.groups:
            self.members[group.name].replace([self.gpus[gpu] for gpu in range(group.gpus.first, group.gpus.end)])
        if not self.host.actors:
            self.host.replace([start_actor(HOST, threads=1, resources={})])

    def build(self, version: int) -> Waiting[None]:
        """Build the host and every engine; they hold the initial weights, labelled as `version` until a load says otherwise."""
        began = time.monotonic()
        host = self._open_host()
        model = Members("model", self.host.actors, self.host.places)
        initial = model.make(finish_initial_model, lambda _: (self.plan, self.model_folder, self.model_process))
        names = [group.name for group in self.groups]
        launched = self._launch(names)
        (self.pids[HOST],) = [made.pid for made in (yield Wait("data sets, tokenizer and rewards", host))]
        self._step("data sets, tokenizer and rewards", began)
        yield Wait("initial weights", initial)
        self._step("initial weights", began)
        yield from self._processes(launched, began)
        yield from self._build_engines(names, version)

    def replace_engines(self, component: Component) -> Waiting[None]:
        """Kill the processes of a component and build its engines anew."""
        self._let_go([component])
        self.start()
        yield from self._processes(self._launch(component.groups), time.monotonic())
        yield from self._build_engines(component.groups, 0)

    def replace_host(self) -> Waiting[None]:
        """Kill the host's process, which is stuck or dead, and start another."""
        import ray

        ray.kill(self.host.actors[0], no_restart=True)
        self.host.replace([])
        self.start()
        (self.pids[HOST],) = [made.pid for made in (yield Wait("data sets, tokenizer and rewards", self._open_host()))]

    def _open_host(self) -> Calls:
        return self.host.make(open_host, lambda _: (self.plan, self.data_folder, self.config))

    def _launch(self, groups: Sequence[str]) -> list[Calls]:
        """Begin everything that needs neither weights nor GPU memory: engines' processes first, then the actors' imports."""
        self.generation += 1
        rendezvous = self._places().rendezvous
        rendezvous.mkdir(mode=0o700, exist_ok=True)
        chosen = [group for group in self.groups if group.name in groups]
        calls = [self._launch_group(group.group) for group in chosen]
        engines = [[each.group.engine for each in chosen if each.gpus.first <= gpu < each.gpus.end] for gpu in self.gpus]
        imports = Members("imports", list(self.gpus.values()), [f"GPU {gpu}" for gpu in self.gpus])
        return [*calls, imports.make(import_engines, lambda index: (engines[index],))]

    def _launch_group(self, group: DeviceGroup) -> Calls:
        members, places = self.members[group.name], self._places()
        launching = Members(_launched(group), members.actors, members.places)
        return launching.make(launch_rank, lambda rank: (self.plan, group, places, rank))

    def _processes(self, launched: Sequence[Calls], began: float) -> Waiting[None]:
        """Wait for what was launched."""
        yield Wait("processes", reduce(Calls.beside, launched))
        self._step("processes and their imports", began)

    def _build_engines(self, groups: Sequence[str], version: int) -> Waiting[None]:
        """Components beside each other; in each, one group after another.

        Where groups take turns on GPUs, each makes room before the next comes: an engine sizes itself by the memory that it
        finds free. At the end the trainer is awake, which is how the first iteration wants it.
        """
        placed = {group.name: group for group in self.groups if group.name in groups}
        components = [each.groups for each in gpu_components(self.plan.graph) if each.groups[0] in placed]
        for turn in zip_longest(*components):
            chosen = [placed[name] for name in turn if name is not None]
            yield from self._build_groups(chosen, version)
            yield from self._move(chosen, offload_rank)
        yield from self._move([group for group in placed.values() if group.group.role == "train"], onload_rank)

    def _build_groups(self, groups: Sequence[PlacedGroup], version: int) -> Waiting[None]:
        """Engines of groups that share no GPU, at once."""
        names, began = ", ".join(f"@{group.name}" for group in groups), time.monotonic()
        calls = [self._build_group(group.group, version) for group in groups]
        made: list[Made] = yield Wait(f"engines of {names}", reduce(Calls.beside, calls))
        places = [place for group in groups for place in self.members[group.name].places]
        for place, each in zip(places, made, strict=True):
            self.pids[place] = each.pid
            parts = {name: round(seconds, 2) for name, seconds in each.parts_s.items()}
            self.event("start_step", "start", f"{place}: engine", seconds=round(each.seconds, 2), parts_s=parts)
        self._step(f"engines of {names}", began)

    def _step(self, what: str, began: float) -> None:
        """Write down what a part of the start took, in seconds since `began`."""
        self.event("start_step", "start", what, seconds=round(time.monotonic() - began, 2))

    def _move(self, groups: Sequence[PlacedGroup], function: Callable[..., Any]) -> Waiting[None]:
        """Put away, or take back, what groups put away in every iteration; embedded engines share a GPU from the start."""
        verb, began = "put away" if function is offload_rank else "take back", time.monotonic()
        found = {group.name: self._parts(group) for group in groups}
        calls = [self.members[name].call(function, parts) for name, parts in found.items() if parts]
        if calls:
            what = "; ".join(f"@{name}: {verb} {', '.join(parts)}" for name, parts in found.items() if parts)
            yield Wait(what, reduce(Calls.beside, calls))
            self._step(what, began)

    def _parts(self, group: PlacedGroup) -> tuple[Part, ...]:
        """What a group puts away in every iteration."""
        if group.group.engine == "torch":
            return ()
        tasks = [task for task in tasks_of(self.plan.graph, Offload) if task.group == group.name]
        return tuple(dict.fromkeys(part for task in tasks for part in task.parts))

    def _build_group(self, group: DeviceGroup, version: int) -> Calls:
        on_gpu = group.role == "train" and group.engine != "torch"
        places = replace(self._places(), port=free_port() if on_gpu else 0)
        extra = (self.threads, version) if group.role == "train" else (self.threads,)
        return self.members[group.name].make(
            FACTORIES[group.role], lambda rank: (self.plan, group, places, rank, *extra), source=_launched(group)
        )

    def _places(self) -> Places:
        temporary = Path(self.session.belongings.temporary)
        return Places(
            model=Path(self.plan.run.model.checkpoint or self.model_folder),
            parked=temporary / f"parked-{self.generation}",
            rendezvous=temporary / f"rendezvous-{self.generation}",
            logs=self.logs_folder,
        )

    def dismiss(self) -> None:
        """Kill every GPU actor; the host's stays, it holds nothing of the run's state."""
        self._let_go(gpu_components(self.plan.graph))

    def _let_go(self, components: Sequence[Component]) -> None:
        import ray

        for gpu in [gpu for each in components for gpu in each.gpus]:
            ray.kill(self.gpus.pop(gpu), no_restart=True)
        self.session.release_placements([each.name for each in components])


def _launched(group: DeviceGroup) -> str:
    """The slot of what was launched for a group."""
    return f"launched {group.name}"


def gpu_components(graph: TaskGraph) -> list[Component]:
    """GPUs in use, by sets of groups that share some of them."""
    found: list[Component] = []
    for group in graph.groups:
        if group.gpus is None:
            continue
        groups: tuple[str, ...] = (group.name,)
        gpus = set(range(group.gpus.first, group.gpus.end))
        for other in [each for each in found if gpus & set(each.gpus)]:
            found.remove(other)
            groups, gpus = (*other.groups, *groups), gpus | set(other.gpus)
        found.append(Component(groups, tuple(sorted(gpus))))
    return found


def component_of(graph: TaskGraph, group: str) -> Component:
    """The component that a group belongs to."""
    return next(each for each in gpu_components(graph) if group in each.groups)


def threads_of_rank(plan: Plan) -> int:
    """Compute threads of each rank: the cores, shared by the ranks that work at one time.

    Groups on different GPUs take turns where no weights edge reaches back further than one iteration.
    """
    overlap = any(edge.carries == "weights" and edge.distance > 1 for edge in plan.graph.edges)
    sizes = [group.gpus.count for group in plan.graph.groups if group.gpus is not None]
    busy = sum(len(each.gpus) for each in gpu_components(plan.graph)) if overlap else max(sizes, default=1)
    return max(1, (os.cpu_count() or 1) // busy)
