"""Reward 1 when the response is the answer, character for character but for white space around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def exact_match(prompt: str, response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1.0 for the answer and nothing else, 0.0 for anything else."""
    return float(response.strip() == answer.strip())
