"""What the host's tasks work with: the tokenizer, data sets by task, and reward workers. One object, in one process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from miles_plan.backends.executor.data_sources import source_file
from miles_plan.backends.executor.drawn_prompts import DrawnPrompts
from miles_plan.data.batch import Array, SampleBatch
from miles_plan.data.demonstrations import DemonstrationSet, open_demonstrations
from miles_plan.data.prompts import PromptSet, open_prompts
from miles_plan.data.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer, tokenizer_from
from miles_plan.ir.plan import Plan, RunOptions, TokenizerSource
from miles_plan.ir.tasks import Evaluate, Prompts, Reward


@dataclass(frozen=True, slots=True)
class Scores:
    """rewards: float32 [N], NaN where a failed sample is dropped; failures: what went wrong, a line each."""

    rewards: Array
    failures: list[str]


@dataclass
class HostTasks:
    """Opened once; data sets are opened when a task first asks, and read errors name file and line."""

    run: RunOptions
    data_folder: Path
    tokenizer: Tokenizer
    vocab_size: int
    _opened: dict[str, Any] = field(default_factory=dict)

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

    def score(self, task: Reward | Evaluate, drawn: DrawnPrompts, samples: SampleBatch) -> Scores:
        """The reward of every sample."""
        prompts = drawn.by_id()
        found = np.zeros(samples.num_samples, dtype=np.float32)
        for index in range(samples.num_samples):
            text = self.tokenizer.decode(samples.response(index).tolist())
            found[index] = float(text.strip() == prompts[int(samples.prompt_id[index])].answer.strip())
        return Scores(found, [])

    def evaluation_prompts(self, task: Evaluate) -> PromptSet:
        """The held-out prompts of a task."""
        if task.name not in self._opened:
            path = source_file(self.run, task.source, "evaluation", self.data_folder)
            self._opened[task.name] = open_prompts(path, self.tokenizer, seed=0, shuffle=False)
        found: PromptSet = self._opened[task.name]
        return found


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
    return host


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
