"""What a pass is, and the runner: needs are checked, the verifier runs after each, instruments look on from outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.gpus import Cluster
from miles_plan.diagnostics import Diagnostic, Location, PlanError
from miles_plan.diagnostics import error as error_at
from miles_plan.diagnostics import warning as warning_at
from miles_plan.ir.graph import Fact, TaskGraph
from miles_plan.ir.plan import Candidate, Decision, Estimate, FailureRow, NumericsRow, TensorTransfer
from miles_plan.ir.verify import verify
from miles_plan.spec.job import JobSpec
from miles_plan.spec.ledger import Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class PassContext:
    """What every pass may read: the job, the model and the cluster it names, and where each spec value came from."""

    job: JobSpec
    model: ModelArchitecture
    teacher: ModelArchitecture | None  # of on-policy distillation
    cluster: Cluster
    locate: Callable[[str], Location | None]
    file: Callable[[str], Path]  # a path that the spec names, ready to open
    ledger: Ledger

    def error(self, code: str, message: str, field: str, *, help: str = "", notes: Sequence[str] = ()) -> Diagnostic:
        """A finding that stops the compile, placed where the spec sets `field` (or would have)."""
        return error_at(code, message, self.locate(field), field=field, help=help, notes=notes)

    def warning(self, code: str, message: str, field: str, *, help: str = "", notes: Sequence[str] = ()) -> Diagnostic:
        """A finding that the user should see and may leave as it is."""
        return warning_at(code, message, self.locate(field), field=field, help=help, notes=notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a pass found: the new graph and everything to be told about it. Errors among the diagnostics stop the compile."""

    graph: TaskGraph
    diagnostics: tuple[Diagnostic, ...] = ()
    decisions: tuple[Decision, ...] = ()
    estimates: tuple[Estimate, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    transfers: tuple[TensorTransfer, ...] = ()
    numerics: tuple[NumericsRow, ...] = ()
    failures: tuple[FailureRow, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def after(self, earlier: Outcome) -> Outcome:
        """This outcome's graph, with everything found before and now, in that order."""
        found: dict[str, Any] = {
            each.name: (*getattr(earlier, each.name), *getattr(self, each.name))
            for each in fields(self)
            if each.name != "graph"
        }
        return Outcome(graph=self.graph, **found)


@dataclass(frozen=True)
class Pass(ABC):
    """A named rewrite that makes one kind of decision: options are fields, the graph that comes in is left as it was."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()

    @abstractmethod
    def run(self, graph: TaskGraph, ctx: PassContext) -> Outcome:
        """The new graph with what was decided, or diagnostics that say why there is none."""


class Instrument(Protocol):
    """Looks on between passes: timing, printing, diffs. Never changes anything."""

    def before(self, each: Pass, graph: TaskGraph) -> None:
        """Called as a pass is about to run."""
        ...

    def after(self, each: Pass, before: TaskGraph, after: TaskGraph) -> None:
        """Called when the pass has run and the verifier has agreed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Passes in order, and who looks on."""

    passes: tuple[Pass, ...]
    instruments: Sequence[Instrument] = field(default=())

    def run(self, graph: TaskGraph, ctx: PassContext) -> Outcome:
        """Run every pass. PlanError holds all errors of the pass that found some; VerifyError is our own bug."""
        outcome = Outcome(graph=graph)
        for each in self.passes:
            if missing := each.needs - outcome.graph.facts:
                raise ValueError(f"pass '{each.name}' needs {sorted(missing)}: order it later")
            outcome = self._step(each, outcome, ctx)
        return outcome

    def _step(self, each: Pass, earlier: Outcome, ctx: PassContext) -> Outcome:
        for instrument in self.instruments:
            instrument.before(each, earlier.graph)
        with ctx.ledger.reading_as(each.name):
            found = each.run(earlier.graph, ctx)
        outcome = replace(found, graph=found.graph.with_facts(each.gives)).after(earlier)
        if any(diagnostic.severity == "error" for diagnostic in found.diagnostics):
            raise PlanError(outcome.diagnostics)
        verify(outcome.graph, num_gpus=ctx.cluster.num_gpus, after=each.name)
        for instrument in self.instruments:
            instrument.after(each, earlier.graph, outcome.graph)
        return outcome
