"""A hundred mistakes of the kinds people make, planted in a valid job: how many are caught, placed, and rightly corrected."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from miles_plan.diagnostics import Diagnostic, PlanError
from miles_plan.spec import load_job
from miles_plan.spec.fields import FieldEntry, all_fields
from miles_plan.spec.foreign_names import FOREIGN_NAMES
from miles_plan.spec.named_things import named_things
from tests.spec.example import VALID, write

SECTIONS = (
    "algorithm",
    "rollout",
    "train",
    "train.optimizer",
    "precision",
    "schedule",
    "checkpoint",
    "weight_sync",
    "failures",
)


@dataclass(frozen=True)
class Mistake:
    """`override` plants it; a right answer names `wanted` in its help, and points at line 1 of the overrides."""

    override: str
    wanted: str


def slip(word: str, dice: random.Random) -> str:
    """`word` with one letter swapped with its neighbour, left out, doubled or replaced."""
    at = dice.randrange(len(word) - 1)
    kind = dice.randrange(4)
    if kind == 0 and word[at] != word[at + 1]:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == 1:
        return word[:at] + word[at + 1 :]
    if kind == 2:
        return word[:at] + word[at] + word[at:]
    return word[:at] + dice.choice(string.ascii_lowercase.replace(word[at], "")) + word[at + 1 :]


def fields_in(section: str) -> list[FieldEntry]:
    return [all_fields()[f"{section}.{name}"] for name in all_fields()[section].inner]


def mistakes(dice: random.Random) -> Iterator[Mistake]:
    sections = [(section, fields_in(section)) for section in SECTIONS]
    for _ in range(30):  # a slip in a key
        section, fields = dice.choice(sections)
        name = dice.choice(fields).path.rpartition(".")[2]
        if len(name) > 2 and (wrong := slip(name, dice)) not in all_fields()[section].inner:
            yield Mistake(f"{section}.{wrong}=1", f"`{name}`")
    worded = [(entry, word) for _, fields in sections for entry in fields for word in entry.kind.words if len(word) > 3]
    for _ in range(25):  # a slip in a word
        entry, word = dice.choice(worded)
        if (wrong := slip(word, dice)) not in entry.kind.words:
            yield Mistake(f"{entry.path}={wrong}", f"`{word}`")
    for name in dice.sample(sorted(FOREIGN_NAMES), 15):  # a key of another framework, at the top
        yield Mistake(f"{name}=1", f"`{FOREIGN_NAMES[name]}`")
    for _ in range(10):  # a key in the wrong section
        name = dice.choice(("temperature", "clip_high", "tokens_per_gpu", "kl_loss_coef", "memory_fraction", "bucket_mib"))
        path = next(path for path in all_fields() if path.endswith(f".{name}"))
        yield Mistake(f"checkpoint.{name}=1", f"`{path}`")
    for path in ("seed", "rollout.top_k", "algorithm.clip", "train.tokens_per_gpu", "failures.max_restarts"):
        yield Mistake(f'{path}="8"', "without quotes")
    for path, name, wanted in (
        ("model.name", "qwen3-30b-a3", "qwen3-30b-a3b"),
        ("model.name", "qwen-8b", "qwen3-8b"),
        ("cluster.gpu", "h20O", "h20"),
        ("cluster.gpu", "H-200", "h200"),
        ("data.reward", "exact-match", "exact_match"),
    ):
        yield Mistake(f"{path}={name}", f"`{wanted}`")
    for path, value in (  # out of range: the message has the bound
        ("rollout.top_p", "1.5"),
        ("algorithm.clip", "-0.2"),
        ("rollout.temperature", "0"),
        ("train.optimizer.beta2", "1.0"),
        ("cluster.nodes", "0"),
        ("rollout.memory_fraction", "1"),
        ("checkpoint.keep", "0"),
        ("algorithm.steps", "1e3"),
        ("rollout.response_tokens.p99", "9000"),
        ("algorithm.updates_per_rollout", "3"),
    ):
        yield Mistake(f"{path}={value}", "")


def findings(spec: str, override: str) -> list[Diagnostic]:
    try:
        return list(named_things(load_job(spec, [override])))
    except PlanError as problem:
        return list(problem.diagnostics)


def test_seeded_mistakes_are_caught_placed_and_corrected(tmp_path: Path) -> None:
    spec, dice = write(tmp_path, VALID), random.Random(20261121)
    planted = list(mistakes(dice))
    assert len(planted) >= 95
    missed, misplaced, uncorrected = [], [], []
    for mistake in planted:
        found = findings(spec, mistake.override)
        if not found:
            missed.append(mistake)
        elif any(each.location is None or not each.location.line for each in found):
            misplaced.append(mistake)
        elif not any(mistake.wanted in each.help or not mistake.wanted for each in found):
            uncorrected.append((mistake, [each.help for each in found]))
    assert len(missed) <= 0.02 * len(planted), missed
    assert misplaced == []
    assert len(uncorrected) <= 0.1 * len(planted), uncorrected


@pytest.mark.parametrize("seed", range(3))
def test_other_seeds_too(seed: int, tmp_path: Path) -> None:
    spec, dice = write(tmp_path, VALID), random.Random(seed)
    planted = [mistake for mistake in mistakes(dice) if mistake.wanted]
    right = [any(mistake.wanted in each.help for each in findings(spec, mistake.override)) for mistake in planted]
    assert sum(right) >= 0.88 * len(planted)
