"""What the host's tasks work with: the tokenizer, data sets by task, and reward workers. One object, in one process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles_plan.backends.executor.data_sources import source_file
from miles_plan.backends.executor.drawn_prompts import DrawnPrompts
from miles_plan.data.batch import SampleBatch
from miles_plan.data.demonstrations import DemonstrationSet, open_demonstrations
from miles_plan.data.prompts import PromptSet, open_prompts
from miles_plan.data.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer, tokenizer_from
from miles_plan.ir.plan import Plan, RunOptions, TokenizerSource
from miles_plan.ir.tasks import Evaluate, Prompts, Reward
from miles_plan.rewards.report import FailurePolicy, RewardReport
from miles_plan.rewards.score import Scorer, open_scorer, response_texts, score
from miles_plan.rewards.worker_link import PoolLimits


@dataclass
class HostTasks:
    """Opened once; data sets are opened when a task first asks, and read errors name file and line."""

    run: RunOptions
    data_folder: Path
    tokenizer: Tokenizer
    vocab_size: int
    _opened: dict[str, Any] = field(default_factory=dict)
    _scorers: dict[str, Scorer] = field(default_factory=dict)

    def prompts(self, task: Prompts) -> PromptSet:
        """The prompts of a task, in its order."""
        if task.name not in self._opened:
            self._opened[task.name] = open_prompts(
                source_file(self.run, task.source, "prompts", self.data_folder),
                self.tokenizer,
                seed=task.seed,
                shuffle=task.shuffle,
                max_prompt_tokens=task.max_prompt_tokens or None,
            )
        found: PromptSet = self._opened[task.name]
        return found

    def demonstrations(self, task: Prompts) -> DemonstrationSet:
        """The demonstrations of a task, in its order."""
        if task.name not in self._opened:
            self._opened[task.name] = open_demonstrations(
                source_file(self.run, task.source, "demonstrations", self.data_folder),
                self.tokenizer,
                seed=task.seed,
                shuffle=task.shuffle,
                max_tokens=task.max_prompt_tokens or None,
            )
        found: DemonstrationSet = self._opened[task.name]
        return found

    def score(self, task: Reward | Evaluate, drawn: DrawnPrompts, samples: SampleBatch) -> RewardReport:
        """The reward of every sample, failures scored by the task's policy."""
        return score(samples, response_texts(samples, self.tokenizer), drawn.by_id(), self.scorer(task))

    def scorer(self, task: Reward | Evaluate) -> Scorer:
        """The open reward of a task. RewardError when it cannot be loaded."""
        if task.name not in self._scorers:
            self._scorers[task.name] = open_scorer(
                task.reward,
                limits=PoolLimits(deadline_s=task.timeout_s),
                policy=FailurePolicy(on_failure=task.on_failure if isinstance(task, Reward) else "zero"),
                workers=task.workers if isinstance(task, Reward) else None,
                search_path=code_path(self.run),
            )
        return self._scorers[task.name]

    def evaluation_prompts(self, task: Evaluate) -> PromptSet:
        """The held-out prompts of a task."""
        if task.name not in self._opened:
            path = source_file(self.run, task.source, "evaluation", self.data_folder)
            self._opened[task.name] = open_prompts(path, self.tokenizer, seed=0, shuffle=False)
        found: PromptSet = self._opened[task.name]
        return found

    def close(self) -> None:
        """End the reward workers."""
        for scorer in self._scorers.values():
            scorer.close()


def open_host(plan: Plan, data_folder: Path, config: Mapping[str, Any]) -> HostTasks:
    """Open the tokenizer and every data set of the plan. DataError lists the lines that cannot be used."""
    tokenizer = open_tokenizer(plan.run.tokenizer)
    vocab_size = int(config["vocab_size"])
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary is {vocab_size}")
    host = HostTasks(plan.run, data_folder, tokenizer, vocab_size)
    for task in plan.graph.tasks:
        if isinstance(task, Prompts):
            host.prompts(task) if task.rows == "prompts" else host.demonstrations(task)
        elif isinstance(task, Evaluate):
            host.evaluation_prompts(task)
        if isinstance(task, Reward | Evaluate):
            host.scorer(task)
    return host


def code_path(run: RunOptions) -> list[str]:
    """Where a job's own code is looked for: beside its spec, then in the working directory."""
    return [*([run.code_directory] if run.code_directory else []), os.getcwd()]


def open_tokenizer(source: TokenizerSource) -> Tokenizer:
    """The tokenizer that the plan names."""
    if source.kind == "byte":
        return ByteTokenizer()
    if source.kind == "characters":
        return CharacterTokenizer(source.characters)
    return tokenizer_from(source.path)


def model_config(plan: Plan) -> Mapping[str, Any]:
    """The model's Hugging Face configuration, from the plan or from the checkpoint it names. OSError names a missing file."""
    if plan.run.model.checkpoint is None:
        return dict(plan.run.model.hf_config or {})
    config = json.loads((Path(plan.run.model.checkpoint) / "config.json").read_text(encoding="utf-8"))
    assert isinstance(config, dict), "compiling the plan has read it"
    return config
