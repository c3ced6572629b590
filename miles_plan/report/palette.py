"""One set of colours for terminal and page: hue says whose it is (trainer blue, rollout orange, host green), shade says what.

Terminal colours are mid-tones that stand on light and on dark backgrounds; the page has its own pair for each scheme in
`templates/report.css`, under the same names.
"""

from __future__ import annotations

from typing import Literal

from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import AnyTask

Activity = Literal["generate", "forward", "update", "move", "save", "host"]

ACTIVITIES: dict[Activity, str] = {
    "generate": "generate",
    "forward": "log-probs",
    "update": "train",
    "move": "sync and offload",
    "save": "checkpoint",
    "host": "on the host",
}

ACTIVITY_OF_KIND: dict[str, Activity] = {
    "rollout": "generate",
    "evaluate": "generate",
    "logprobs": "forward",
    "values": "forward",
    "train_step": "update",
    "draft_step": "update",
    "weight_sync": "move",
    "quantize": "move",
    "offload": "move",
    "onload": "move",
    "checkpoint": "save",
}

TERMINAL_ACTIVITY: dict[Activity, str] = {
    "generate": "#e08a2e",
    "forward": "#5fb0e8",
    "update": "#4a7fe0",
    "move": "#a071e0",
    "save": "#2fa3a3",
    "host": "#6fa388",
}
TERMINAL_ROLE: dict[str, str] = {"train": "#4a7fe0", "rollout": "#e08a2e", "host": "#6fa388"}
TERMINAL_SHADES: dict[str, tuple[str, ...]] = {
    "train": ("#3f74d9", "#86b6f2", "#2b55a8", "#a9cdf7", "#2a93ad", "#7fd0de", "#6a62d9", "#b4b0f0"),
    "rollout": ("#d9772b", "#f2bb6b", "#a8541f", "#f7d9a0", "#c79a1e", "#e8d35f", "#d9604f", "#f0a99e"),
    "host": ("#5a9a7c", "#a3cdb8", "#3f7059", "#c5e0d3", "#7c8f2f", "#bccb75", "#4f9c9c", "#a5d2d2"),
}
TERMINAL_MINOR = "#8a9099"
NUM_SHADES = 8
MINOR = NUM_SHADES


def activity(task: AnyTask) -> Activity:
    """What a task does, in six kinds that have a colour each; what runs on the host without a GPU is `host`."""
    return ACTIVITY_OF_KIND.get(task.kind, "host")


def role_of_owner(graph: TaskGraph, owner: str) -> str:
    """The role whose hue a memory term's owner takes; owners that are no group are the host's."""
    return next((group.role for group in graph.groups if group.name == owner), "host")


def shades_of_terms(plan: Plan, place: str) -> dict[tuple[str, str], int]:
    """The shade of every memory term (owner, name) of the GPUs' or the hosts' timelines, the same in all charts of a place.

    The largest terms of a role get a shade each; those beyond NUM_SHADES are small, and share the shade MINOR.
    """
    largest: dict[tuple[str, str], int] = {}
    for timeline in plan.graph.memory:
        for phase in timeline.phases if timeline.place == place else ():
            for term in phase.terms:
                largest[(term.owner, term.name)] = max(largest.get((term.owner, term.name), 0), term.size_bytes)
    shades: dict[tuple[str, str], int] = {}
    used: dict[str, int] = {}
    for key in sorted(largest, key=lambda key: -largest[key]):
        role = role_of_owner(plan.graph, key[0])
        shades[key] = min(used.get(role, 0), MINOR)
        used[role] = used.get(role, 0) + 1
    return shades
