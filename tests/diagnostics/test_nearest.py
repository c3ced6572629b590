from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.diagnostics import nearest
from miles_plan.spec.fields import all_fields

KINDS = ("sft", "grpo", "gspo", "ppo", "reinforce_plus_plus", "rloo", "dapo", "distillation")


@pytest.mark.parametrize(
    ("word", "choice"),
    [
        ("gpro", "grpo"),
        ("GRPO", "grpo"),
        ("grpo ", "grpo"),
        ("distilation", "distillation"),
        ("reinforce-plus-plus", "reinforce_plus_plus"),
        ("reinforce", "reinforce_plus_plus"),
        ("dist", "distillation"),
        ("", ""),
        ("xyz", ""),
        ("po", "ppo"),
        ("xy", ""),
        ("g" * 65, ""),
    ],
)
def test_the_name_that_was_meant(word: str, choice: str) -> None:
    assert nearest(word, KINDS) == choice


def test_two_equally_near_names_are_no_answer() -> None:
    assert nearest("cat", ("bat", "hat")) == ""


@given(word=st.text(max_size=70), choices=st.lists(st.text(min_size=1, max_size=20), max_size=5))
def test_any_word(word: str, choices: list[str]) -> None:
    assert nearest(word, choices) in {"", *choices}


@given(name=st.sampled_from(sorted({path.rpartition(".")[2] for path in all_fields()})), at=st.integers(0, 30))
def test_a_swapped_letter_finds_the_field_again(name: str, at: int) -> None:
    if len(name) < 6:
        return
    at %= len(name) - 1
    slipped = name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    others = {path.rpartition(".")[2] for path in all_fields()}
    assert slipped in others or nearest(slipped, others) in {name, ""}
    assert nearest(slipped, (name,)) == name


def test_a_hundred_unknown_keys_take_no_time() -> None:
    names = [path.rpartition(".")[2] for path in all_fields()]
    start = time.process_time()
    for index in range(100):
        nearest(f"{'x' * 50}{index}", names)
    assert time.process_time() - start < 0.5
