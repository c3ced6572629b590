"""Rewards of a user for the tests of runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def share_of_digits(prompt: str, response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """How much of the response is digits: differs between samples of even an untrained policy."""
    return sum(character.isdigit() for character in response) / max(1, len(response))


def raises_on_short(prompt: str, response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """Fails on some samples."""
    if len(response) < 3:
        raise ValueError("too short for me")
    return share_of_digits(prompt, response, answer, metadata)
