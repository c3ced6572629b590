"""A whole valid job, as short as a spec can be, for tests to change."""

from __future__ import annotations

from pathlib import Path

VALID = """\
version: 1
name: example
model: {name: qwen3-30b-a3b}
cluster: {gpu: h200, nodes: 2}
algorithm: {kind: grpo, clip: 0.2, clip_high: 0.28}
data: {prompts: {generator: arithmetic}, reward: exact_match}
rollout:
  prompts_per_step: 32
  samples_per_prompt: 8
  response_tokens: {max: 8192, mean: 3500, p99: 8000}
"""


SMALL = """\
version: 1
name: small
model:
  tokenizer: byte
  architecture:
    {model_type: qwen3, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
     head_dim: 16, intermediate_size: 128, vocab_size: 256}
cluster: {gpu: cpu, gpus_per_node: 2}
algorithm: {kind: grpo, steps: 20}
data: {prompts: {generator: arithmetic}, reward: exact_match}
rollout: {engine: torch, prompts_per_step: 8, samples_per_prompt: 4, response_tokens: {max: 8, mean: 4, p99: 8}}
train: {engine: torch}
"""  # quick to plan


def write(directory: Path, text: str = VALID, name: str = "spec.yaml") -> str:
    """Put `text` into a file and return its path."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)
