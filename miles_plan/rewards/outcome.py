"""What scoring one sample takes and gives. Read by reward workers, so this module imports nothing heavy."""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Reason = Literal["raised", "deadline", "died", "not_finite", "wrong_type", "wrong_count", "too_much_output", "left_processes"]

LARGEST_FLOAT32 = 3.4028234663852886e38
LONGEST_DETAIL = 400


class RewardItem(NamedTuple):
    """One sample to score; items of one `group` are samples of one prompt."""

    prompt: str
    response: str
    answer: str
    metadata: Mapping[str, Any]
    group: int = 0


RewardFunction = Callable[[str, str, str, Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The score of one sample, or why there is none. parts are named figures beside the reward; output is what was printed."""

    score: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: Reason | None = None
    detail: str = ""
    output: str = ""


def call_reward(function: RewardFunction, item: RewardItem) -> Outcome:
    """Run a reward of one sample and judge what comes of it; nothing but the end of the process gets past this."""
    try:
        returned = function(item.prompt, item.response, item.answer, item.metadata)
    except BaseException as error:
        return Outcome(reason="raised", detail=describe(error))
    return judge(returned)


def judge(returned: object) -> Outcome:
    """A reward's return value: a finite number, or a dict of such with `reward` among them."""
    if isinstance(returned, Mapping):
        if "reward" not in returned:
            return Outcome(reason="wrong_type", detail="returned a dict without 'reward'")
        values = {str(name): _number(value, f"'{name}' is ") for name, value in returned.items()}
        if bad := next((value for value in values.values() if isinstance(value, Outcome)), None):
            return bad
        finite = {name: value for name, value in values.items() if not isinstance(value, Outcome)}
        return Outcome(score=finite.pop("reward"), parts=finite)
    value = _number(returned, "returned ")
    return value if isinstance(value, Outcome) else Outcome(score=value)


def describe(error: BaseException) -> str:
    """The last line of a traceback and where in the user's code it was raised, at most LONGEST_DETAIL characters."""
    try:
        text = traceback.format_exception_only(error)[-1].strip()
    except Exception:  # an exception whose own __str__ raises
        text = type(error).__name__
    return text[: LONGEST_DETAIL - 100] + _place(error)[-100:]


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"


def _number(value: object, what: str) -> float | Outcome:
    if not isinstance(value, numbers.Real):
        return Outcome(reason="wrong_type", detail=f"{what}{_shown(value)}, not a number")
    try:
        number = float(value)
    except (OverflowError, ValueError):
        number = math.inf
    if not abs(number) <= LARGEST_FLOAT32:
        return Outcome(reason="not_finite", detail=f"{what}{number}")
    return number


def _shown(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
