"""`miles-plan explain SPEC --why-not train.tp=4`: the answer as text and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from miles_plan.cli.exit_code import ExitCode
from miles_plan.diagnostics import PlanError

if TYPE_CHECKING:
    from miles_plan.passes.joint_search import JointChoice
    from miles_plan.passes.questions import Questions
    from miles_plan.passes.why_not import Answer, Overflow

GIB = 1 << 30
HEADLINES = {
    "chosen": "That is what was chosen.",
    "slower": "It fits, and is slower.",
    "faster": "It fits, and would be faster: the spec does not leave it open.",
    "too large": "It does not fit.",
    "impossible": "It is impossible.",
}
PARTS = ("rollout_s", "train_s", "sync_s", "transition_s")


def explain_why_not(file: str, texts: list[str], sets: list[str], as_json: bool) -> None:
    """Compile the job, search again with what is asked, and print what comes of it."""
    from miles_plan.passes.compile import compile_job, context_of
    from miles_plan.passes.questions import QuestionError, read_questions
    from miles_plan.passes.why_not import why_not
    from miles_plan.spec import load_job

    try:
        questions = read_questions(texts)
    except QuestionError as problem:
        raise _usage(str(problem)) from None
    loaded = load_job(file, sets)
    if loaded.spec.algorithm.kind == "sft":
        raise _usage("--why-not asks the joint search of trainer and rollout engines; an sft job has no rollout")
    compile_job(loaded)
    fixed = [f"{side}.layout" for side in ("train", "rollout") if _fixed_against(loaded.spec, side, questions)]
    changed = load_job(file, [*sets, *questions.overrides(fixed)])
    try:
        answer = why_not(context_of(loaded)[0], context_of(changed)[0], questions)
    except PlanError as refused:
        raise PlanError(refused.diagnostics, changed.sources) from None
    if as_json:
        sys.stdout.write(json.dumps(answer_json(answer, questions), indent=2, ensure_ascii=False) + "\n")
    else:
        notes = [f"{field} is fixed in the spec; it was set free to answer this" for field in fixed]
        sys.stdout.write("\n".join([*answer_text(answer, questions), *notes]) + "\n")


def _fixed_against(spec: Any, side: str, questions: Questions) -> bool:
    """Whether the spec fixes the layout of a side whose sizes are asked about."""
    asked = questions.sizes.train if side == "train" else questions.sizes.rollout
    return bool(asked) and getattr(spec, side).layout != "auto"


def answer_text(answer: Answer, questions: Questions) -> Iterator[str]:
    """The answer in lines."""
    yield f"why not {', '.join(f'{name}={value}' for name, value in questions.asked)}? {HEADLINES[answer.verdict]}"
    yield ""
    for reason in answer.reasons:
        yield f"  {reason}"
    if answer.overflow is not None:
        yield from _overflow_lines(answer.overflow)
        for at, change in enumerate(answer.changes):
            yield f"  {'nearest change that makes it fit' if not at else 'also'}: {change}"
        if not answer.changes:
            yield "  no single change of a field, and no pair of them, was seen to make it fit"
    if answer.reasons or answer.overflow is not None:
        yield ""
        yield f"  chosen instead: {_plan_line(answer.choice)}"
    elif answer.best is not None and answer.verdict == "chosen":
        yield f"  {_plan_line(answer.choice)}"
    elif answer.best is not None:
        yield from _comparison(answer.choice, answer.best)


def _overflow_lines(overflow: Overflow) -> Iterator[str]:
    if overflow.side == "together":
        yield f"  {overflow.reason}"
        return
    missing = f"{overflow.missing_bytes / GIB:.1f} GiB a GPU"
    why = f" ({overflow.reason})" if overflow.reason else ""
    yield f"  {overflow.side}: the smallest such layout, {overflow.layout}, is {missing} too large{why}"
    for name, size in overflow.terms:
        yield f"    {name:<28}{size / GIB:>8.1f} GiB"


def _plan_line(choice: JointChoice) -> str:
    return (
        f"{choice.split}; train {choice.train.layout}, recompute {choice.train.recompute}, "
        f"{choice.train.tokens_per_gpu} tokens a micro-batch; rollout {choice.rollout.layout}; {choice.transport}"
    )


def _comparison(choice: JointChoice, best: JointChoice) -> Iterator[str]:
    """Both plans, and where the seconds go."""
    yield f"  chosen     {_plan_line(choice)}"
    yield f"  best such  {_plan_line(best)}"
    yield ""
    yield f"  {'':<14}{'chosen':>12}{'best such':>12}{'more':>12}"
    one, other = price_json(choice), price_json(best)
    for name in (*PARTS, "step_s"):
        label = name.removesuffix("_s")
        yield f"  {label:<14}{one[name]:>10.2f} s{other[name]:>10.2f} s{other[name] - one[name]:>+10.2f} s"
    hours = other["gpu_hours_per_step"] - one["gpu_hours_per_step"]
    yield f"  {'GPU-hours':<14}{one['gpu_hours_per_step']:>12.3f}{other['gpu_hours_per_step']:>12.3f}{hours:>+12.3f}"
    rooms = [each["headroom_bytes"] / GIB for each in (one, other)]
    yield f"  {'headroom':<14}{rooms[0]:>8.1f} GiB{rooms[1]:>8.1f} GiB{rooms[1] - rooms[0]:>+8.1f} GiB"
    yield ""
    ratio = best.step_s / max(choice.step_s, 1e-12)
    part = max(PARTS, key=lambda name: abs(other[name] - one[name]))
    yield f"  {ratio:.2f}x the step time; most of the difference is in {part.removesuffix('_s')}"


def price_json(choice: JointChoice) -> dict[str, Any]:
    """One plan with its price, as JSON data."""
    return {
        "placement": str(choice.split),
        "train_layout": str(choice.train.layout),
        "rollout_layout": str(choice.rollout.layout),
        "recompute": choice.train.recompute,
        "tokens_per_gpu": choice.train.tokens_per_gpu,
        "optimizer_offload": choice.train.optimizer_offload,
        "transport": choice.transport,
        "step_s": choice.step_s,
        "rollout_s": choice.rollout.rollout_s,
        "train_s": choice.train_s,
        "sync_s": choice.sync_s,
        "transition_s": choice.transition_s,
        "gpu_hours_per_step": choice.gpu_hours,
        "headroom_bytes": int(choice.headroom_bytes),
    }


def answer_json(answer: Answer, questions: Questions) -> dict[str, Any]:
    """The answer as JSON data."""
    overflow = answer.overflow
    return {
        "schema": "miles-plan/why-not/1",
        "asked": dict(questions.asked),
        "verdict": answer.verdict,
        "reasons": list(answer.reasons),
        "overflow": None
        if overflow is None
        else {
            "side": overflow.side,
            "layout": overflow.layout,
            "missing_bytes": int(overflow.missing_bytes),
            "terms_bytes": {name: int(size) for name, size in overflow.terms},
            "reason": overflow.reason,
        },
        "changes": list(answer.changes),
        "chosen": price_json(answer.choice),
        "best": price_json(answer.best) if answer.best is not None else None,
    }


def _usage(message: str) -> typer.Exit:
    sys.stderr.write(f"{message}\n")
    return typer.Exit(ExitCode.INTERNAL)
