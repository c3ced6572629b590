"""The processes of a run: one actor a GPU, which holds a rank of every engine that owns that GPU, and one for the host's tasks.

An actor only knows slots (named objects that live in it) and applies functions to them; what a task does stands in the
functions of `operations`, which run here. Large results stay in Ray's object store: the driver gets a small report and a
reference.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from miles_plan.backends.executor.device_memory import visible_gpus, watched

T = TypeVar("T")

HOST_THREADS = 4  # a slow reward must not hold up the advantages of the iteration before it


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """What a function returned, the seconds it took in its process, and the most that its GPU held meanwhile (0: no GPU)."""

    report: T
    seconds: float
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Made:
    """Something that was put into a slot: the process that holds it, and the seconds it took, with parts where it names any."""

    pid: int
    seconds: float
    parts_s: Mapping[str, float]


class Actor:
    """What runs inside a worker process."""

    def __init__(self, name: str, threads: int, on_gpu: bool = False) -> None:
        """threads: compute threads of this process, the same at every start of the run; on_gpu: its GPU's memory is watched."""
        self.name = name
        self.slots: dict[str, Any] = {}
        os.environ["OMP_NUM_THREADS"] = str(threads)  # torch is imported later, and reads it then
        self.threads = threads
        self.gpu = next(iter(visible_gpus()), None) if on_gpu else None

    def make(self, slot: str, source: str, factory: Callable[..., Any], *arguments: Any) -> Timed[Made]:
        """Put what `factory` returns into a slot. source: a slot whose object it takes over as first argument, "" for none."""
        began = time.perf_counter()
        given = (self.slots.pop(source, None), *arguments) if source else arguments
        with watched(self.gpu) as peak:
            self.slots[slot] = factory(*given)
        seconds = time.perf_counter() - began
        return Timed(Made(os.getpid(), seconds, dict(getattr(self.slots[slot], "start_s", {}))), seconds, peak.used_bytes)

    def apply(self, slot: str, function: Callable[..., Any], *arguments: Any) -> Timed[Any]:
        """Call `function` with the slot's object first."""
        began = time.perf_counter()
        with watched(self.gpu) as peak:
            report = function(self.slots[slot], *arguments)
        return Timed(report, time.perf_counter() - began, peak.used_bytes)

    def apply_pair(self, slot: str, other: str, function: Callable[..., Any], *arguments: Any) -> Timed[Any]:
        """Call `function` with the objects of two slots first; None for the second where this process does not hold it."""
        return self.apply(slot, function, self.slots.get(other), *arguments)

    def produce(self, slot: str, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
        """Like `apply` for a function that returns a report and then large values, which stay in the object store."""
        began = time.perf_counter()
        with watched(self.gpu) as peak:
            report, *values = function(self.slots[slot], *arguments)
        return Timed(report, time.perf_counter() - began, peak.used_bytes), *values

    def close(self) -> None:
        """Close what the slots hold."""
        for held in reversed(list(self.slots.values())):
            if hasattr(held, "close"):
                held.close()
        self.slots.clear()

    def stacks(self) -> str:
        """What every thread of the process is doing; answered while another call runs."""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            return file.read().decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Calls:
    """The same call on several actors: references to their reports and, where asked, to the values they produced.

    slot: what was called, `host` or a group's name; owners: of calls on several slots, whose each report is.
    """

    slot: str
    reports: tuple[Any, ...]
    values: tuple[Any, ...] = ()
    owners: tuple[str, ...] = ()

    def owner(self, index: int) -> str:
        """The slot that a report comes from."""
        return self.owners[index] if self.owners else self.slot

    def beside(self, other: Calls) -> Calls:
        """Both at once, as one wait: this one's reports first."""
        owners = tuple(each.owner(index) for each in (self, other) for index in range(len(each.reports)))
        return Calls(self.slot, (*self.reports, *other.reports), (*self.values, *other.values), owners)


class Members:
    """The driver's handle on actors that hold ranks of one engine, or on the one that holds the host's slot.

    The handle stays the same when the actors behind it are replaced: operations under way go on with the new ones.
    """

    def __init__(self, slot: str, actors: Sequence[Any], places: Sequence[str]) -> None:
        """Handles in rank order, and what to call each of them in messages."""
        self.slot, self.actors, self.places = slot, tuple(actors), tuple(places)

    def replace(self, actors: Sequence[Any]) -> None:
        """Other actors, in rank order."""
        self.actors = tuple(actors)

    def make(
        self, factory: Callable[..., Any], arguments_of_rank: Callable[[int], tuple[Any, ...]], *, source: str = ""
    ) -> Calls:
        """Build each rank's engine from arguments of its own, before them what its process holds in slot `source`."""
        made = (
            actor.make.remote(self.slot, source, factory, *arguments_of_rank(rank)) for rank, actor in enumerate(self.actors)
        )
        return Calls(self.slot, tuple(made))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Calls:
        """`function(engine, *arguments)` on every rank; references among the arguments are followed."""
        return Calls(self.slot, tuple(actor.apply.remote(self.slot, function, *arguments) for actor in self.actors))

    def call_with(self, other: str, function: Callable[..., Any], *arguments: Any) -> Calls:
        """`function(engine, other_engine, *arguments)` on every rank, with what its process holds of the other slot."""
        made = (actor.apply_pair.remote(self.slot, other, function, *arguments) for actor in self.actors)
        return Calls(self.slot, tuple(made))

    def call_each(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Calls:
        """`function(engine, *arguments[rank])` on every rank."""
        pairs = zip(self.actors, arguments, strict=True)
        return Calls(self.slot, tuple(actor.apply.remote(self.slot, function, *each) for actor, each in pairs))

    def produce(self, function: Callable[..., Any], *arguments: Any, values: int = 1) -> Calls:
        """Like `call`, for functions that return a report and then so many large values; those of all ranks in rank order."""
        made = [actor.produce.options(num_returns=1 + values).remote(self.slot, function, *arguments) for actor in self.actors]
        return Calls(self.slot, tuple(each[0] for each in made), tuple(value for each in made for value in each[1:]))

    def stacks(self, timeout_s: float) -> str:
        """What the threads of every rank are doing; ranks that do not answer in time are named."""
        import ray

        asked = {place: actor.stacks.remote() for place, actor in zip(self.places, self.actors, strict=True)}
        answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
        texts = [f"== {place}\n{ray.get(ref) if ref in answered else 'no answer'}" for place, ref in asked.items()]
        return "\n".join(texts) + "\n"

    def part(self, ranks: Sequence[int]) -> Members:
        """Only these ranks."""
        return Members(self.slot, [self.actors[rank] for rank in ranks], [self.places[rank] for rank in ranks])

    def __len__(self) -> int:
        """How many ranks."""
        return len(self.actors)


def start_actor(name: str, *, threads: int, resources: dict[str, float], placement: Any = None, bundle: int = 0) -> Any:
    """Start one actor. It comes back as a handle at once; calls wait for the process to be up."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    wanted = {key: amount for key, amount in resources.items() if key != "GPU"}
    strategy = PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=bundle) if placement else "DEFAULT"
    remote: Any = ray.remote(concurrency_groups={"control": 1})(_with_control(Actor))  # type: ignore[call-overload]  # not in its stubs
    return remote.options(
        num_cpus=0,
        num_gpus=resources.get("GPU", 0),
        resources=wanted,
        scheduling_strategy=strategy,
        max_concurrency=HOST_THREADS if placement is None else 1,
        max_restarts=0,
    ).remote(name, threads, bool(resources.get("GPU")))


def _with_control(actor: type[Actor]) -> type[Actor]:
    """The class with `stacks` in a thread of its own, so that a busy or stuck actor still answers it."""
    import ray

    return type(actor.__name__, (actor,), {"stacks": ray.method(concurrency_group="control")(actor.stacks)})
