"""The driver of a tiny run whose rollout engine is SGLang's: `python -m ...run_sglang RUN_DIR [exact]`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import typer

from miles_plan.backends.executor.run import execute
from miles_plan.cli.running import carry_out
from miles_plan.ir.plan import Plan
from tests.backends.executor.tiny_plans import tiny_plan


def sglang_plan(*, exact: bool) -> Plan:
    """Four iterations on two devices; only with `exact` are log-probs compared, which the stand-in makes up."""
    plan = tiny_plan(iterations=4, warm=0, moe=False, colocated=False, reference=False, checkpoint_every=100)
    groups = tuple(replace(each, engine="sglang") if each.role == "rollout" else each for each in plan.graph.groups)
    scored = replace(plan.graph.task("old_log_probs"), max_log_prob_diff=0.0 if exact else None)
    return replace(plan, graph=replace(plan.graph, groups=groups).with_replaced(scored))


if __name__ == "__main__":
    try:
        root = Path(sys.argv[1])
        carry_out(lambda: execute(sglang_plan(exact="exact" in sys.argv[2:]), root), root)
    except typer.Exit as ending:
        sys.exit(ending.exit_code)
