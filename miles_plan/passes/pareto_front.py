"""What of the Pareto front a plan shows, and in words why each point is on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from miles_plan.ir.plan import Candidate
from miles_plan.passes.joint_search import JointChoice, JointSearch

KEPT_CANDIDATES = 12
GIB = 1 << 30


def candidates(search: JointSearch, binding: str) -> Iterator[Candidate]:
    """The choice first, then the rest of what is kept, fastest first. `binding`: what keeps the choice from being faster."""
    for index, choice in enumerate(kept_points(search.front)):
        yield Candidate(
            train_layout=str(choice.train.layout),
            rollout_layout=str(choice.rollout.layout),
            placement=str(choice.split),
            step_s=choice.step_s,
            gpu_hours_per_step=choice.gpu_hours,
            headroom_bytes=int(choice.headroom_bytes),
            chosen=index == 0,
            note=options_text(choice),
            why=reason(search.front, choice),
            binding=binding if index == 0 else "",
        )


def options_text(choice: JointChoice) -> str:
    """What the layouts do not say: recomputation, micro-batches, where the optimizer lives, how weights travel."""
    parts = [f"recompute {choice.train.recompute}", f"{choice.train.tokens_per_gpu} tokens a micro-batch"]
    parts += ["optimizer on the host"] if choice.train.optimizer_offload else []
    parts += [choice.transport] + (["offloads in turn"] if choice.sleeping else [])
    return ", ".join(parts)


def kept_points(front: Sequence[JointChoice], limit: int = KEPT_CANDIDATES) -> list[JointChoice]:
    """At most `limit` points: the fastest, the cheapest, the roomiest, and then always the one furthest from those kept.

    Distance is in the logarithms of step time and GPU-hours and in levels of headroom. The fastest comes first.
    """
    if not front:
        return []
    kept = list(dict.fromkeys((0, _cheapest(front), _roomiest(front))))
    places = [_place(choice) for choice in front]
    while len(kept) < min(limit, len(front)):
        kept.append(
            max(
                (at for at in range(len(front)) if at not in kept),
                key=lambda at: (min(math.dist(places[at], places[other]) for other in kept), -at),
            )
        )
    return [front[at] for at in sorted(kept)]


def _place(choice: JointChoice) -> tuple[float, float, float]:
    return math.log(max(choice.step_s, 1e-12)), math.log(max(choice.gpu_hours, 1e-12)), choice.headroom_level / 25.0


def _cheapest(front: Sequence[JointChoice]) -> int:
    return min(range(len(front)), key=lambda at: (front[at].gpu_hours, front[at].step_s))


def _roomiest(front: Sequence[JointChoice]) -> int:
    return min(range(len(front)), key=lambda at: (-front[at].headroom_level, front[at].step_s))


def reason(front: Sequence[JointChoice], choice: JointChoice) -> str:
    """Why a point is on the front: what it is best in, or what it gives for its longer step."""
    best = {"fastest": 0, "cheapest": _cheapest(front), "most headroom": _roomiest(front)}
    first = [name for name, at in best.items() if front[at] is choice]
    if first:
        return ", ".join(first)
    fastest = front[0]
    gains = []
    if choice.gpu_hours < fastest.gpu_hours:
        gains.append(f"{1.0 - choice.gpu_hours / fastest.gpu_hours:.0%} fewer GPU-hours")
    if choice.headroom_level > fastest.headroom_level:
        gains.append(f"{(choice.headroom_bytes - fastest.headroom_bytes) / GIB:.0f} GiB more headroom")
    return f"{' and '.join(gains)} for {choice.step_s / max(fastest.step_s, 1e-12) - 1.0:.1%} more time"
