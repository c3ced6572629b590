"""The one untyped call into torch.autograd.Function, so that every op stays typed."""

from __future__ import annotations

from typing import Any

import torch


def apply(function: type[torch.autograd.Function], *arguments: object) -> Any:
    """`function.apply(*arguments)`: a tensor, or a tuple of them as its forward returns."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call] # torch leaves `apply` without annotations
