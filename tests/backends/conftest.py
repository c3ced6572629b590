"""Real ranks for tests, processes or threads, and tiny checkpoints of every family, made once per session by transformers."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from miles_plan.backends.torch_engine.weights import initialise_checkpoint

TIMEOUT_S = 120
COMMON: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_biased_llama3_rope": {
        "model_type": "llama",
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen3_tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 16, **MOE},
    "qwen3_moe_mixed": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        **MOE,
        "norm_topk_prob": False,
        "mlp_only_layers": [0],
        "num_hidden_layers": 3,
    },
}


class RankPool:
    """Up to `size` spawned processes; `run` gives ranks 0 .. world_size - 1 a fresh place to meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """function(rank, rendezvous, *arguments) on each rank; results in rank order. Fails with the first rank's traceback."""
        while len(self.workers) < world_size:
            self.workers.append(_start_worker())
        with tempfile.TemporaryDirectory() as directory:
            rendezvous = f"file://{Path(directory) / 'store'}"
            for rank in range(world_size):
                self.workers[rank][1].send((function, rank, rendezvous, arguments))
            results, errors = [], []
            for rank in range(world_size):
                process, connection = self.workers[rank]
                if not connection.poll(TIMEOUT_S):
                    errors.append(f"rank {rank}: no answer after {TIMEOUT_S} s (exit code {process.exitcode})")
                    break
                kind, value = connection.recv()
                (results if kind == "result" else errors).append(value)
                if errors:
                    break
        if errors:
            self.close()
            pytest.fail("\n".join(errors), pytrace=False)
        return results

    def close(self) -> None:
        """End the processes; a later `run` starts new ones."""
        for process, connection in self.workers:
            connection.close()
            process.terminate()
            process.join()
        self.workers = []


def _start_worker() -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _work(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, rank, rendezvous, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("result", function(rank, rendezvous, *arguments))
        except Exception:
            answer = ("error", f"rank {rank}:\n{traceback.format_exc()}")
        connection.send(answer)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's checkpoint, random weights with seed 0."""
    root = tmp_path_factory.mktemp("checkpoints")

    def directory(family: str) -> Path:
        path = root / family
        if not path.exists():
            initialise_checkpoint({**COMMON, **FAMILIES[family]}, path, seed=0)
        return path

    return directory


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[[int, Callable[[int, str], Any]], list[Any]]:
    """run_ranks(size, function): what `function(rank, rendezvous)` returns for each rank, ranks being threads."""
    calls = iter(range(1000))

    def run(size: int, function: Callable[[int, str], Any]) -> list[Any]:
        rendezvous = f"file://{tmp_path}/rendezvous-{next(calls)}"
        with ThreadPoolExecutor(size) as threads:
            return list(threads.map(lambda rank: function(rank, rendezvous), range(size)))

    return run
