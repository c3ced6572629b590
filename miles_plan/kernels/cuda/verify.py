"""Is every op invariant on this GPU? Random draws, bit for bit, in about a minute; the report names the op that differs first.

`invariance_checks` says what is compared. Several processes share the GPU, each with its own checks, because compiling kernels
and drawing shapes is the host's work: with sixteen of them a minute holds thousands of draws of each op.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .draw import Draw
from .invariance_checks import CHECKS, Check

MOST_WORKERS = 16
MOST_CHARGED_S = 0.05
MOST_LATE_S = 120.0  # of a process: its last draw may compile a dozen kernels


@dataclass
class OpReport:
    """What the draws of one check and dtype showed."""

    op: str
    dtype: str
    draws: int = 0
    """Comparisons of one shape, position and set of neighbours."""
    differing_draws: int = 0
    differing_elements: int = 0
    first_shape: str | None = None
    """The shape and position of the first comparison that differed."""
    first_seed: int | None = None
    """Draw(first_seed, device) shows it again."""
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Something was drawn, nothing differed and nothing failed."""
        return self.draws > 0 and self.differing_draws == 0 and self.error is None


@dataclass
class Report:
    """The result of `verify`."""

    gpu: str
    torch_version: str
    triton_version: str
    date: str
    """ISO 8601, of the day."""
    seconds: float = 0.0
    ops: list[OpReport] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Every op is invariant."""
        return all(op.ok for op in self.ops)

    @property
    def first(self) -> OpReport | None:
        """The first op, in the order of a forward pass, that is not."""
        return next((op for op in self.ops if not op.ok), None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


def verify(
    seconds: float = 60.0,
    seed: int = 0,
    device: str = "cuda",
    workers: int | None = None,
    checks: Sequence[Check] = CHECKS,
) -> Report:
    """Run every check with each of its dtypes in turn for about `seconds`, each at least once; kernels compile on first use.

    seed: the first draw's; the next ones count up. workers: processes that share the GPU, by default one a core and at most
    sixteen; 1 stays in this process. Raises ValueError if there is no such device.
    """
    where = torch.device(device)
    if where.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}; allowed: a CUDA device that is there")
    import triton

    today = datetime.date.today().isoformat()
    report = Report(torch.cuda.get_device_name(where), torch.__version__, triton.__version__, today)
    count = min(len(os.sched_getaffinity(0)), MOST_WORKERS) if workers is None else workers
    pairs = [(check, dtype) for check in checks for dtype in check.dtypes]
    begin = time.monotonic()
    deadline = time.time() + seconds
    if count <= 1:
        report.ops = run_pairs(pairs, seed, device, deadline)
    else:
        report.ops = _run_in_processes(pairs, seed, device, deadline, count)
    report.seconds = time.monotonic() - begin
    return report


def run_pairs(pairs: Sequence[tuple[Check, torch.dtype]], seed: int, device: str, deadline: float) -> list[OpReport]:
    """Draw for the pairs until `deadline` (of time.time()), each at least once and for as long as the others."""
    where = torch.device(device)
    reports = [OpReport(check.name, _name(dtype)) for check, dtype in pairs]
    spent_s = [0.0] * len(pairs)
    turns = [0] * len(pairs)
    for each in range(len(pairs)):
        _draw_once(pairs[each], reports[each], seed, where)
        turns[each] = 1
    while time.time() < deadline:
        left = [each for each in range(len(pairs)) if reports[each].error is None]
        if not left:
            break
        # the one that has had least time, so that a slow op does not hold the others back; compiling counts as one draw
        each = min(left, key=lambda one: spent_s[one])
        begin = time.monotonic()
        _draw_once(pairs[each], reports[each], seed + turns[each], where)
        turns[each] += 1
        spent_s[each] += min(time.monotonic() - begin, MOST_CHARGED_S)
    return reports


def _draw_once(pair: tuple[Check, torch.dtype], op: OpReport, seed: int, where: torch.device) -> None:
    check, dtype = pair
    draw = Draw(seed, where)
    try:
        check.run(draw, dtype)
        elements, shape = draw.outcome()
    except Exception as error:  # whatever a kernel's compiler or launch raises is a finding about the op
        op.error = f"{type(error).__name__}: {error} (seed {seed})"
        return
    op.draws += draw.comparisons
    op.differing_elements += elements
    if shape is not None:
        op.differing_draws += 1
        if op.first_shape is None:
            op.first_shape, op.first_seed = shape, seed


def shares_of(weights: Sequence[int], workers: int) -> list[list[int]]:
    """Indices of `weights` dealt to at most `workers`, the heaviest first, each to the one with the least so far."""
    shares: list[list[int]] = [[] for _ in range(min(workers, len(weights)))]
    for index in sorted(range(len(weights)), key=lambda one: -weights[one]):
        min(shares, key=lambda share: sum(weights[one] for one in share)).append(index)
    return shares


def _run_in_processes(
    pairs: Sequence[tuple[Check, torch.dtype]], seed: int, device: str, deadline: float, count: int
) -> list[OpReport]:
    """Each process in a pool of its own, so that one that dies or never ends takes only its own checks along."""
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    shares = shares_of([check.weight_in(dtype) for check, dtype in pairs], count)
    pools = [ProcessPoolExecutor(1, mp_context=context) for _ in shares]
    futures: list[Future[list[OpReport]]] = [
        pool.submit(run_pairs, [pairs[i] for i in share], seed, device, deadline)
        for pool, share in zip(pools, shares, strict=True)
    ]
    found: dict[int, OpReport] = {}
    for pool, share, future in zip(pools, shares, futures, strict=True):
        try:
            reports = future.result(timeout=max(0.0, deadline + MOST_LATE_S - time.time()))
        except TimeoutError:
            failed = f"its process did not end within {MOST_LATE_S:g} s of its time; a kernel may wait for ever"
            reports = _failed([pairs[i] for i in share], failed)
            pool.shutdown(wait=False, cancel_futures=True)
        except RuntimeError as error:  # BrokenProcessPool is one
            reports = _failed([pairs[i] for i in share], f"its process died: {error}")
        found |= dict(zip(share, reports, strict=True))
    for pool, future in zip(pools, futures, strict=True):
        pool.shutdown(wait=future.done())
    for process in set(multiprocessing.active_children()) - others:
        process.kill()
    return [found[i] for i in range(len(pairs))]


def _failed(pairs: Sequence[tuple[Check, torch.dtype]], error: str) -> list[OpReport]:
    """All checks of a process: which of them it was in is not known."""
    names = ", ".join(f"{check.name} ({_name(dtype)})" for check, dtype in pairs)
    return [OpReport(check.name, _name(dtype), error=f"{error} (with {names})") for check, dtype in pairs]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
