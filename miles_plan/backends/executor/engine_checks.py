"""Which engines a machine can run: what is installed, against what was seen to work. Nothing heavy is imported for it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from miles_plan.backends.known_versions import NEEDS, SEEN, Package, Seen, release_seen

Installed = Callable[[str], str | None]
State = Literal["can run", "untested releases", "missing packages", "no GPU"]
ON_GPU = frozenset({"megatron", "fsdp2", "sglang"})
ROLES = {
    "torch": "trainer and rollout engine, on CPUs too",
    "megatron": "trainer",
    "fsdp2": "trainer",
    "sglang": "rollout engine",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageState:
    """One package of an engine. found: the release that is installed, None where none is; seen: one known to work."""

    package: Package
    found: str | None
    seen: str | None

    @property
    def verdict(self) -> Literal["ok", "other", "missing"]:
        """other: installed in a release that was not seen with this engine."""
        if self.found is None:
            return "missing"
        return "ok" if self.seen is None or _plain(self.found) == _plain(self.seen) else "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """Whether one engine can run here, and by which packages."""

    engine: str
    role: str
    state: State
    packages: tuple[PackageState, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """A row of what was seen together, and where this machine differs: (package, installed or None, seen)."""

    seen: Seen
    differences: tuple[tuple[str, str | None, str], ...]


def installed_release(name: str) -> str | None:
    """The release of an installed package, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def engine_states(gpus: int, installed: Installed = installed_release) -> Iterator[EngineState]:
    """One engine after another. gpus: how many this machine has."""
    for engine, needs in NEEDS.items():
        packages = tuple(
            PackageState(package=each, found=installed(each.name), seen=release_seen(engine, each.name)) for each in needs
        )
        verdicts = {each.verdict for each in packages}
        state: State = "can run"
        if "missing" in verdicts:
            state = "missing packages"
        elif engine in ON_GPU and not gpus:
            state = "no GPU"
        elif "other" in verdicts and engine in ON_GPU:
            state = "untested releases"
        yield EngineState(engine=engine, role=ROLES[engine], state=state, packages=packages)


def combinations(installed: Installed = installed_release) -> Iterator[Combination]:
    """Every combination that was seen, with what differs here."""
    for row in SEEN:
        compared = ((name, installed(name), release) for name, release in row.versions)
        yield Combination(
            seen=row,
            differences=tuple(each for each in compared if each[1] is None or _plain(each[1]) != _plain(each[2])),
        )


def _plain(release: str) -> str:
    """Without the local part: 2.11.0+cu130 is 2.11.0."""
    return release.partition("+")[0]
