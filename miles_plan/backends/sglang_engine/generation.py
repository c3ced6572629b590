"""Between requests and SGLang's own: sampling parameters one way, samples in columns the other. Pure functions, no SGLang."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from miles_plan.backends.engine import EngineError, Request
from miles_plan.data.batch import Array, SampleBatch
from miles_plan.ir.options import SamplingOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """The experts of a model: indices of its mixture-of-experts layers, all layers, all experts, how many a token takes."""

    layers: tuple[int, ...]
    num_layers: int
    num_experts: int
    topk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """Responses in columns. tokens int32 [R], log_probs float32 [R], lengths int32 [N], stopped bool [N].

    routing: uint8 or uint16 [T - N, moe_layers, topk], every token of every sequence but its last, or None.
    """

    tokens: Array
    log_probs: Array
    lengths: Array
    stopped: Array
    routing: Array | None = None


def sampling_parameters(options: SamplingOptions, sample_id: int, *, seeded: bool) -> dict[str, Any]:
    """SGLang's sampling parameters of one request. seeded: the engine is deterministic and takes a seed a request."""
    parameters: dict[str, Any] = {
        "max_new_tokens": options.max_response_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k or -1,
        "stop_token_ids": list(options.stop_token_ids),
    }
    if seeded:
        parameters["sampling_seed"] = seed_of(options.seed, sample_id)
    return parameters


def seed_of(seed: int, sample_id: int) -> int:
    """A 31-bit seed of one sample: samples of a prompt must differ, and the same run must draw the same."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()[:4], "little") >> 1


def responses(outputs: Sequence[Mapping[str, Any]], routed: Routed | None) -> Responses:
    """Columns of what `sglang.Engine.generate` returned, in the order of the requests.

    EngineError for an aborted request, for token ids and log-probs that do not belong together, for log-probs that are not
    finite, and for routing of another shape than the model's.
    """
    for index, output in enumerate(outputs):
        _check_finished(index, output)
    lengths = np.array([len(output["output_ids"]) for output in outputs], dtype=np.int32)
    total = int(lengths.sum())
    tokens = np.fromiter(chain.from_iterable(output["output_ids"] for output in outputs), dtype=np.int32, count=total)
    # all at once: a NumPy call a sample would cost more than the tokens of a short response
    scored = list(chain.from_iterable(output["meta_info"]["output_token_logprobs"] for output in outputs))
    if not np.array_equal(np.fromiter(map(itemgetter(1), scored), dtype=np.int32, count=total), tokens):
        raise EngineError("sglang: log-probs that are not those of the tokens they came with")
    log_probs = np.fromiter(map(itemgetter(0), scored), dtype=np.float32, count=total)
    if not np.isfinite(log_probs).all():
        raise EngineError("sglang: a log-prob is not finite; check the weights")
    routing = None
    if routed is not None:
        fed = [int(output["meta_info"]["prompt_tokens"]) + len(output["output_ids"]) - 1 for output in outputs]
        parts = [_experts(output["meta_info"], routed, at, fed[at]) for at, output in enumerate(outputs)]
        routing = np.concatenate(parts) if parts else None
    stopped = np.array([output["meta_info"]["finish_reason"]["type"] == "stop" for output in outputs], dtype=bool)
    return Responses(tokens=tokens, log_probs=log_probs, lengths=lengths, stopped=stopped, routing=routing)


def _check_finished(index: int, output: Mapping[str, Any]) -> None:
    """EngineError for a request that was aborted, or whose log-probs are not as many as its tokens."""
    meta = output["meta_info"]
    reason = meta.get("finish_reason") or {}
    if reason.get("type") not in ("stop", "length"):
        raise EngineError(f"sglang: request {index} was not finished: {reason.get('message') or reason}")
    if len(meta["output_token_logprobs"]) != len(output["output_ids"]):
        counts = f"{len(meta['output_token_logprobs'])} log-probs that are not those of its {len(output['output_ids'])} tokens"
        raise EngineError(f"sglang: request {index}: {counts}")


def _experts(meta: Mapping[str, Any], routed: Routed, index: int, rows: int) -> Array:
    """Experts of one sequence, [rows, moe_layers, topk]; SGLang counts every layer, dense ones too, as int32 in base64."""
    found = meta.get("routed_experts")
    if found is None:
        raise EngineError(f"sglang: request {index} came back without its experts")
    flat = np.frombuffer(base64.b64decode(found), dtype=np.int32)
    if flat.size != rows * routed.num_layers * routed.topk:
        raise EngineError(
            f"sglang: request {index}: {flat.size} expert ids, not {rows} tokens x {routed.num_layers} layers x {routed.topk}"
        )
    chosen = flat.reshape(rows, routed.num_layers, routed.topk)[:, list(routed.layers)]
    if chosen.size and not (chosen.min() >= 0 and chosen.max() < routed.num_experts):
        raise EngineError(f"sglang: request {index}: expert {int(chosen.max())} of {routed.num_experts}")
    return chosen.astype(np.uint8 if routed.num_experts <= 256 else np.uint16)


def batch_of(requests: Sequence[Request], made: Responses, *, version: int) -> SampleBatch:
    """Prompts and responses as samples; every response token carries the version that sampled it."""
    if len(made.lengths) != len(requests):
        raise EngineError(f"sglang: {len(made.lengths)} responses to {len(requests)} requests")
    sequences: list[Array] = []
    rows: list[Array] = []
    at = routed_at = 0
    for request, length in zip(requests, made.lengths.tolist(), strict=True):
        sequences += [np.asarray(request.prompt, dtype=np.int32), made.tokens[at : at + length]]
        at += length
        if made.routing is not None:
            fed = len(request.prompt) + length - 1
            rows += [made.routing[routed_at : routed_at + fed], np.zeros((1, *made.routing.shape[1:]), made.routing.dtype)]
            routed_at += fed
    prompt_length = np.array([len(request.prompt) for request in requests], dtype=np.int32)
    return SampleBatch(
        sample_id=np.array([request.sample_id for request in requests], dtype=np.int64),
        prompt_id=np.array([request.prompt_id for request in requests], dtype=np.int64),
        tokens=np.concatenate(sequences) if sequences else np.zeros(0, dtype=np.int32),
        prompt_length=prompt_length,
        length=prompt_length + made.lengths,
        stopped=made.stopped,
        rollout_log_probs=made.log_probs,
        weight_version=np.full(len(made.tokens), version, dtype=np.int32),
        routing=np.concatenate(rows) if rows else None,
    )
