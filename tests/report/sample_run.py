"""A run of a plan as the executor leaves it, played with noisy task times."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from miles_plan.ir.plan import Plan, write_plan


class RunWriter:
    """Plays a plan with noisy task times and writes the run directory's files; one rollout is killed and retried."""

    def __init__(self, plan: Plan, seed: int = 7) -> None:
        self.plan, self.rng = plan, random.Random(seed)
        self.metrics: list[dict[str, Any]] = []
        self.timeline: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.now = 1.2

    def write(self, run_dir: Path, *, rl_iterations: int = 60) -> Path:
        self.event(0.0, "run_started", "run", self.plan.name, session=1)
        for loop in self.plan.graph.loops:
            iterations = rl_iterations if loop.name == "rl" else loop.iterations
            for iteration in range(iterations):
                began = self.now
                self.iteration(loop.name, iteration, iterations)
                self.metrics.append(self.metrics_of(loop.name, iteration, iterations, self.now - began))
        self.event(self.now, "run_finished", "run", "completed")
        run_dir.mkdir(parents=True, exist_ok=True)
        write_plan(self.plan, run_dir / "plan.json")
        (run_dir / "summary.json").write_text(json.dumps(self.summary(rl_iterations)), encoding="utf-8")
        for name, rows in (("metrics", self.metrics), ("timeline", self.timeline), ("events", self.events)):
            (run_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (run_dir / "checkpoints" / "step_20").mkdir(parents=True, exist_ok=True)
        (run_dir / "checkpoints" / "step_20" / "manifest.json").write_text("{}", encoding="utf-8")
        return run_dir

    def iteration(self, loop: str, iteration: int, iterations: int) -> None:
        began, busy_until = self.now, self.now
        for task in sorted(self.plan.graph.topological(loop), key=lambda task: task.start_s or 0.0):
            if (iteration + 1) % task.every and iteration + 1 != iterations:
                continue
            assert task.estimate is not None
            took_s = task.estimate.mid_s * self.rng.lognormvariate(0.06, 0.16)
            start_s = began + (task.start_s or 0.0) if task.group == "host" else max(began + (task.start_s or 0.0), busy_until)
            attempt = 0
            if task.name == "rollout" and iteration == 23:
                self.task_run(task, iteration, start_s, start_s + took_s / 2, 0)
                self.event(start_s + took_s / 2, "task_failed", f"{task.name}@23", "actor died: signal 9", attempt=0)
                self.event(start_s + took_s / 2 + 0.4, "actors_rebuilt", f"{task.name}@23", "rollout")
                start_s, attempt = start_s + took_s / 2 + 0.4, 1
            busy_until = max(busy_until, start_s + took_s)
            self.task_run(task, iteration, start_s, start_s + took_s, attempt)
        self.now = busy_until + 0.004

    def task_run(self, task: Any, iteration: int, start_s: float, end_s: float, attempt: int) -> None:
        place = {"task": task.name, "loop": task.loop, "iteration": iteration, "group": task.group}
        self.timeline.append(place | {"start_s": start_s, "end_s": end_s, "busy_s": end_s - start_s, "attempt": attempt})

    def event(self, time_s: float, kind: str, owner: str, subject: str, **more: Any) -> None:
        self.events.append({"time_s": time_s, "kind": kind, "owner": owner, "subject": subject} | more)

    def metrics_of(self, loop: str, iteration: int, iterations: int, step_s: float) -> dict[str, Any]:
        """Curves that rise and fall as such runs do."""
        rng, progress = self.rng, iteration / max(1, iterations - 1)
        row = {"loop": loop, "iteration": iteration, "step": iteration + 1, "step_s": step_s, "task_s": {"train": step_s}}
        row["grad_norm"] = 0.4 + rng.random() * 0.5
        if loop != "rl":
            return row | {"loss": 2.7 * math.exp(-3.2 * progress) + 0.25 + rng.random() * 0.05, "tokens_per_s": 21e3}
        return row | {
            "reward_mean": 0.31 + 0.55 / (1 + math.exp(-9 * (progress - 0.4))) + rng.gauss(0, 0.02),
            "reward_std": 0.42 * (1 - 0.6 * progress),
            "loss": rng.gauss(0.002, 0.01),
            "kl": 0.004 * iteration**0.5,
            "entropy": 1.1 - 0.7 * progress + rng.gauss(0, 0.03),
            "response_tokens_mean": 6 + 3 * progress + rng.random(),
            "max_abs_log_prob_diff": 0.0,
            "tokens_compared": 1100 + rng.randrange(50),
            "routing_mismatches": 0,
            "tokens_per_s": 1400 + rng.random() * 300,
        }

    def summary(self, steps: int) -> dict[str, Any]:
        return {
            "seed": self.plan.run.seed,
            "steps": steps,
            "wall_s": self.now,
            "reward_first": 0.31,
            "reward_last": 0.86,
            "max_abs_logprob_diff": 0.0,
            "tokens_compared": 67_000,
            "routing_mismatches": 0,
            "restarts": 1,
            "final_weights_sha256": "ab" * 32,
        }
