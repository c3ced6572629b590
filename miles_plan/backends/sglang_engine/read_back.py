"""What an engine says it runs with, against what it was asked: SGLang resolves its arguments, and some of them change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from miles_plan.backends.engine import EngineError

# Written by the loader under another name, or not part of what the scheduler holds.
_FOLDED = {"cuda_graph_max_bs_decode", "disable_prefill_cuda_graph", "model_path"}
_POOL_TOLERANCE = 0.03  # of the tokens planned: the plan's own accuracy of memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """What one engine runs with. Bytes are of one GPU, as SGLang measured them while it started."""

    version: str
    pool_tokens: int
    max_running: int
    weight_bytes: int
    pool_bytes: int
    graph_bytes: int


def effective(info: Mapping[str, Any]) -> Effective:
    """The facts of `Engine.get_server_info()`."""
    state = info["internal_states"][0]
    memory = state["memory_usage"]
    gib = 1 << 30
    return Effective(
        version=str(info["version"]),
        pool_tokens=int(memory["token_capacity"]),
        max_running=int(state["effective_max_running_requests_per_dp"]),
        weight_bytes=int(memory["weight"] * gib),
        pool_bytes=int(memory["kvcache"] * gib),
        graph_bytes=int(memory["graph"] * gib),
    )


def differences(asked: Mapping[str, Any], info: Mapping[str, Any]) -> Iterator[str]:
    """Every argument that the engine's scheduler holds with another value than was asked for."""
    state: Mapping[str, Any] = info["internal_states"][0]
    for name, wanted in asked.items():
        if name in _FOLDED:
            continue
        if name == "chunked_prefill_size":
            wanted = wanted // asked["dp_size"]
        found = state.get(name, info.get(name))
        if found != wanted and not (isinstance(wanted, float) and found is not None and abs(found - wanted) < 1e-9):
            yield f"{name}: asked for {wanted!r}, runs with {found!r}"
    yield from _graph_differences(asked, state)
    facts = effective(info)
    if asked["max_running_requests"] // asked["dp_size"] != facts.max_running:
        yield f"requests at a time: asked for {asked['max_running_requests']}, runs with {facts.max_running} an attention rank"
    if facts.pool_tokens < asked["max_total_tokens"] * (1 - _POOL_TOLERANCE):
        yield f"KV cache: the plan has {asked['max_total_tokens']} tokens, {facts.pool_tokens} found room"


def _graph_differences(asked: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[str]:
    """CUDA graphs are resolved into one object for both phases."""
    config = state.get("cuda_graph_config")
    if config is None:
        return
    phases = config if isinstance(config, Mapping) else vars(config)
    decode, prefill = (_fields(phases[name]) for name in ("decode", "prefill"))
    if decode.get("max_bs") != asked["cuda_graph_max_bs_decode"]:
        yield f"CUDA graphs: asked for batches up to {asked['cuda_graph_max_bs_decode']}, captured up to {decode.get('max_bs')}"
    if asked["disable_prefill_cuda_graph"] and prefill.get("backend") != "disabled":
        yield f"CUDA graphs of prefill: asked for none, runs with {prefill.get('backend')}"


def _fields(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else vars(value)


def check(asked: Mapping[str, Any], info: Mapping[str, Any]) -> Effective:
    """The facts of an engine that runs as asked. EngineError lists every difference."""
    if found := list(differences(asked, info)):
        raise EngineError("sglang does not run as it was asked to: " + "; ".join(found))
    return effective(info)
