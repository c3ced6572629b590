"""Answers to --why-not are the search's own, narrowed to what is asked."""

from __future__ import annotations

from typing import Any

import pytest

from miles_plan.passes.joint_search import search_jointly
from miles_plan.passes.questions import QuestionError, read_questions
from miles_plan.passes.why_not import Answer, why_not
from miles_plan.passes.workload import step_workload
from tests.passes.contexts import context

MOE: dict[str, Any] = {"model": {"name": "qwen3-30b-a3b"}, "cluster": {"gpu": "h200", "nodes": 1}}


def answer(*texts: str, job: dict[str, Any] | None = None, **settings: Any) -> Answer:
    """The answer for a job, with the settings that the question makes."""
    chosen = job or MOE
    return why_not(context(**chosen), context(**(chosen | settings)), read_questions(texts))


def test_each_size_is_a_part_of_the_space_whose_best_part_is_the_choice() -> None:
    found = [answer(f"train.tp={tp}") for tp in (1, 2, 4, 8)]
    best = [each.best for each in found if each.best is not None]
    assert len(best) == 4
    assert min(each.step_s for each in best) == found[0].choice.step_s
    assert [each.verdict for each in found].count("chosen") == 1
    assert all(each.train.layout.tp == tp for each, tp in zip(best, (1, 2, 4, 8), strict=True))


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("train.tp=3", "tp=3 does not divide 32 attention heads"),
        ("train.tp=16", "crosses the NVLink domain of 8 GPUs"),
        ("train.ep=3", "ep=3 does not divide 128 experts"),
        ("train.pp=100", "the model has 48 layers"),
        ("rollout.tp=3", "tp=3 does not divide 32 attention heads"),
        ("rollout.engines=9", "GPUs, 8 are given"),
    ],
)
def test_the_rule_that_forbids_it_is_named(asked: str, reason: str) -> None:
    found = answer(asked)
    assert found.verdict == "impossible"
    assert any(reason in each for each in found.reasons), found.reasons


def test_what_the_search_would_not_think_of_is_priced() -> None:
    found = answer("train.cp=3", "train.dp=1", "train.tp=1", job=MOE | {"cluster": {"gpu": "h200", "nodes": 3}})
    assert found.verdict in ("slower", "impossible", "too large")
    assert answer("train.vpp=2", "train.pp=4").best is not None


def test_a_trainer_that_does_not_fit_says_by_how_much_and_what_would_help() -> None:
    job = {"model": {"name": "qwen3-30b-a3b"}, "cluster": {"gpu": "h100", "nodes": 2}}
    found = answer("train.tp=1", "train.ep=1", "train.pp=1", job=job)
    assert found.verdict == "too large"
    assert found.overflow is not None
    assert found.overflow.side == "train"
    assert found.overflow.missing_bytes > 0
    assert "parameters" in dict(found.overflow.terms)


def test_engines_that_do_not_fit_name_their_weights() -> None:
    job = {"model": {"name": "qwen3-235b-a22b"}, "cluster": {"gpu": "h200", "nodes": 8}}
    found = answer("rollout.tp=2", job=job)
    assert found.verdict == "too large"
    assert found.overflow is not None
    assert found.overflow.side == "rollout"
    assert dict(found.overflow.terms)["weights"] > 100 * 2**30
    assert any("precision.rollout" in change for change in found.changes)


def test_settings_are_asked_about_too() -> None:
    assert answer("placement=disaggregate", placement="disaggregate").verdict in ("slower", "chosen")
    full = answer("recompute=full", train={"recompute": "full"})
    assert full.best is not None
    assert full.best.train.recompute == "full"
    assert full.best.step_s >= full.choice.step_s


def test_the_choice_is_that_of_compile() -> None:
    ctx = context(**MOE)
    assert answer("train.tp=2").choice == search_jointly(ctx, step_workload(ctx)).front[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tran.tp=4", "did you mean train.tp?"),
        ("tp=4", "did you mean rollout.tp or train.tp?"),
        ("train.tp=four", "a whole number above 0"),
        ("train.tp=0", "a whole number above 0"),
        ("train.tp", "write name=value"),
        ("transprt=p2p", "did you mean transport?"),
    ],
)
def test_questions_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(QuestionError, match=message.replace("?", r"\?")):
        read_questions([text])


def test_contradicting_questions() -> None:
    with pytest.raises(QuestionError, match="at once"):
        read_questions(["train.tp=2", "train.layout.tp=4"])
