"""Which engines a machine can run, by what is installed on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from miles_plan.backends.executor.engine_checks import combinations, engine_states
from miles_plan.backends.known_versions import NEEDS, SEEN


def machine(**changed: str | None) -> Callable[[str], str | None]:
    """A machine with the releases that were seen with Megatron and SGLang, but for `changed`."""
    releases: dict[str, str | None] = {**dict(SEEN[0].versions), "safetensors": "0.8.0", "torch": "2.11.0+cu130"}
    releases |= {name.replace("_", "-") if name != "torch_memory_saver" else name: value for name, value in changed.items()}
    return lambda name: releases.get(name)


def states(gpus: int, **changed: str | None) -> dict[str, str]:
    return {each.engine: each.state for each in engine_states(gpus, machine(**changed))}


def test_where_everything_is_as_it_was_seen_every_engine_can_run() -> None:
    assert set(states(1).values()) == {"can run"}
    assert set(states(1)) == set(NEEDS)


def test_without_a_gpu_only_the_embedded_engines_can() -> None:
    assert states(0) == {"torch": "can run", "megatron": "no GPU", "fsdp2": "no GPU", "sglang": "no GPU"}


@pytest.mark.parametrize(
    ("changed", "engine", "state"),
    [
        ({"sglang": None}, "sglang", "missing packages"),
        ({"torch_memory_saver": None}, "sglang", "missing packages"),
        ({"transformers": "5.17.0"}, "sglang", "untested releases"),
        ({"megatron_core": "0.16.1"}, "megatron", "untested releases"),
        ({"megatron_core": "0.16.1"}, "sglang", "can run"),
    ],
)
def test_what_is_missing_or_other_shows_at_the_engine_that_needs_it(
    changed: dict[str, str | None], engine: str, state: str
) -> None:
    assert states(1, **changed)[engine] == state


def test_a_combination_says_where_this_machine_differs() -> None:
    row = next(iter(combinations(machine(transformers="5.17.0", sglang=None))))
    assert row.differences == (("sglang", None, "0.5.16"), ("transformers", "5.17.0", "5.12.1"))
    assert next(iter(combinations(machine()))).differences == ()


def test_every_package_says_why_and_how() -> None:
    assert all(package.why and "pip install" in package.get for packages in NEEDS.values() for package in packages)
    assert all(row.source for row in SEEN)
