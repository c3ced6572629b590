"""No field is accepted and ignored: each is read by a pass in some job, or is declared inert with its reason."""

from __future__ import annotations

from pathlib import Path

from miles_plan.passes.compile import compile_job
from miles_plan.spec import load_job
from miles_plan.spec.section import leaves

ROOT = Path(__file__).parent.parent.parent
JOBS = sorted([*(ROOT / "tests/golden/passes").glob("*/*.yaml"), *(ROOT / "specs").glob("quickstart*.yaml")])
MORE = Path(__file__).parent / "consumption"


def test_every_field_is_read_somewhere() -> None:
    known: set[str] = set()
    read: set[str] = set()
    for path in [*JOBS, *sorted(MORE.glob("*.yaml"))]:
        loaded = load_job(path)
        compile_job(loaded)
        for leaf, _, inert in leaves(loaded.spec):
            if inert is None:
                known.add(leaf)
                if loaded.ledger.readers(leaf):
                    read.add(leaf)
    ignored = sorted(known - read)
    assert not ignored, ", ".join(ignored)
