"""The engines under contract: add one here, and both suites hold it to the protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from miles_plan.backends.engine import RolloutEngine, TrainEngine
from miles_plan.backends.fsdp_engine.options import FsdpEngineOptions
from miles_plan.backends.fsdp_engine.train_engine import FsdpTrainEngine
from miles_plan.backends.megatron_engine.options import MegatronEngineOptions
from miles_plan.backends.megatron_engine.train_engine import MegatronTrainEngine
from miles_plan.backends.sglang_engine.engine_link import EngineLink
from miles_plan.backends.sglang_engine.generation import Routed
from miles_plan.backends.sglang_engine.rollout_engine import SglangOptions, SglangRolloutEngine, launch
from miles_plan.backends.sglang_engine.server_arguments import ServerArguments
from miles_plan.backends.torch_engine.options import RolloutEngineOptions, TrainEngineOptions
from miles_plan.backends.torch_engine.rollout_engine import TorchRolloutEngine
from miles_plan.backends.torch_engine.train_engine import TorchTrainEngine
from miles_plan.backends.torch_engine.weights import initialise_checkpoint
from tests.backends.megatron_engine import cuda_stand_ins

SIZES: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # the least that every engine rotates
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3", **SIZES},
    "moe": {
        "model_type": "qwen3_moe",
        **SIZES,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
}


@dataclass(frozen=True)
class Engines:
    """A trainer and a rollout engine that speak to each other, made for one model; `close` ends all that were made."""

    model: str
    directory: Path
    make_trainer: Callable[[Path, Path], TrainEngine]
    make_rollout: Callable[[Path], RolloutEngine]
    exact: bool  # rollout and trainer agree bit for bit
    scratch: Path
    opened: list[TrainEngine | RolloutEngine] = field(default_factory=list)

    def trainer(self) -> TrainEngine:
        """One rank that is a whole trainer, with a reference model."""
        self.opened.append(engine := self.make_trainer(self.directory, self.scratch / f"host{len(self.opened)}"))
        return engine

    def rollout(self) -> RolloutEngine:
        """One rank that is a whole rollout engine; it records routing for a mixture-of-experts model."""
        self.opened.append(engine := self.make_rollout(self.directory))
        return engine

    def close(self) -> None:
        """Close every engine."""
        for engine in self.opened:
            engine.close()


def _torch_trainer(directory: Path, host: Path) -> TrainEngine:
    return TorchTrainEngine(
        TrainEngineOptions(model_directory=directory, host_directory=host, keep_reference=True, micro_batch_tokens=50)
    )


def _torch_rollout(directory: Path) -> RolloutEngine:
    return TorchRolloutEngine(
        RolloutEngineOptions(
            model_directory=directory, kv_pool_tokens=512, page_tokens=8, max_running=6, return_routing=directory.name == "moe"
        )
    )


def _megatron_trainer(directory: Path, host: Path) -> TrainEngine:
    return MegatronTrainEngine(
        MegatronEngineOptions(
            model_directory=directory,
            host_directory=host,
            keep_reference=True,
            micro_batch_tokens=50,
            dtype="float32",
            device="cpu",
        )
    )


def _fsdp_trainer(directory: Path, host: Path) -> TrainEngine:
    return FsdpTrainEngine(
        FsdpEngineOptions(
            model_directory=directory,
            host_directory=host,
            keep_reference=True,
            micro_batch_tokens=50,
            dtype="float32",
            device="cpu",
        )
    )


class SglangEngines:
    """SGLang engines, one after another: the next one's process imports SGLang, half of its start, while a test still runs."""

    def __init__(self, logs: Path) -> None:
        self._logs, self._launched = logs, 0
        self._next: dict[Path, tuple[SglangOptions, EngineLink]] = {}

    def rollout(self, directory: Path) -> RolloutEngine:
        """An engine of the model in `directory`."""
        options, link = self._next.pop(directory, None) or self._launch(directory)
        self._next[directory] = self._launch(directory)
        return SglangRolloutEngine(options, link)

    def _launch(self, directory: Path) -> tuple[SglangOptions, EngineLink]:
        self._launched += 1
        options = _sglang_options(directory, self._logs / f"sglang-{self._launched}.log")
        return options, launch(options.arguments, gpus=options.gpus, log=options.log, name=options.name)

    def close(self) -> None:
        """End the processes whose turn never came."""
        for _, link in self._next.values():
            link.close()


def _sglang_options(directory: Path, log: Path) -> SglangOptions:
    moe = directory.name == "moe"
    arguments = ServerArguments(
        model_path=str(directory),
        dtype="bfloat16",
        quantization=None,
        kv_cache_dtype="auto",
        tp_size=1,
        pp_size=1,
        ep_size=1,
        dp_size=1,
        enable_dp_attention=False,
        mem_fraction_static=0.05,
        max_total_tokens=4096,
        max_running_requests=16,
        chunked_prefill_size=8192,
        max_prefill_tokens=8192,
        page_size=16,
        disable_radix_cache=False,
        attention_backend="triton",
        sampling_backend="pytorch",
        cuda_graph_max_bs_decode=16,
        disable_prefill_cuda_graph=True,
        enable_deterministic_inference=True,
        enable_return_routed_experts=moe,
        enable_memory_saver=True,
        random_seed=0,
    )
    routed = Routed(layers=(0, 1), num_layers=2, num_experts=8, topk=2) if moe else None
    return SglangOptions(
        arguments=arguments,
        gpus=("0",),
        log=log,
        vocab_size=SIZES["vocab_size"],
        max_positions=SIZES["max_position_embeddings"],
        routed=routed,
    )


def need_sglang() -> None:
    """Skip the test where SGLang or a GPU for it is missing."""
    if find_spec("sglang") is None or not torch.cuda.is_available():
        pytest.skip("needs SGLang and a GPU")


KINDS: dict[str, dict[str, Any]] = {
    "torch": {"make_trainer": _torch_trainer, "make_rollout": _torch_rollout, "exact": True},
    "fsdp": {"make_trainer": _fsdp_trainer, "make_rollout": _torch_rollout, "exact": False},
    "megatron": {"make_trainer": _megatron_trainer, "make_rollout": _torch_rollout, "exact": False},
    "sglang": {"make_trainer": _torch_trainer, "make_rollout": None, "exact": False},  # of the session's SglangEngines
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for each model, random weights with seed 0."""
    root = tmp_path_factory.mktemp("contract")
    for name, config in MODELS.items():
        initialise_checkpoint(config, root / name, seed=0)
    return root


@pytest.fixture(scope="session")
def sglang_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngines]:
    made = SglangEngines(tmp_path_factory.mktemp("sglang"))
    yield made
    made.close()


@pytest.fixture(params=[(kind, model) for kind in KINDS for model in MODELS], ids="-".join)
def engines(
    request: pytest.FixtureRequest, checkpoints: Path, sglang_engines: SglangEngines, tmp_path: Path
) -> Iterator[Engines]:
    kind, model = request.param
    parts = dict(KINDS[kind])
    if kind == "megatron":
        cuda_stand_ins.need_megatron()
    elif kind == "sglang":
        need_sglang()
        parts["make_rollout"] = sglang_engines.rollout
    made = Engines(model=model, directory=checkpoints / model, scratch=tmp_path, **parts)
    yield made
    made.close()
