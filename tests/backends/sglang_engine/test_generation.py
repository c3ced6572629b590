"""Between our requests and samples, and what SGLang takes and returns."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.backends.engine import EngineError, Request
from miles_plan.backends.sglang_engine.generation import Routed, batch_of, responses, sampling_parameters, seed_of
from miles_plan.ir.options import SamplingOptions

ROUTED = Routed(layers=(1, 2), num_layers=3, num_experts=8, topk=2)


def output(
    tokens: list[int], log_probs: list[float], *, prompt: int = 2, stop: bool = True, routed: bool = False
) -> dict[str, Any]:
    """One answer as SGLang 0.5.16 gives it with skip_tokenizer_init."""
    meta: dict[str, Any] = {
        "prompt_tokens": prompt,
        "finish_reason": {"type": "stop", "matched": tokens[-1]} if stop else {"type": "length", "length": len(tokens)},
        "output_token_logprobs": [(score, token, None) for score, token in zip(log_probs, tokens, strict=True)],
    }
    if routed:
        rows = prompt + len(tokens) - 1
        ids = np.arange(rows * 6, dtype=np.int32).reshape(rows, 3, 2) % 8
        meta["routed_experts"] = base64.b64encode(ids.tobytes()).decode()
    return {"output_ids": tokens, "meta_info": meta}


def test_every_sampling_option_reaches_sglang() -> None:
    options = SamplingOptions(max_response_tokens=9, temperature=0.7, top_p=0.9, top_k=5, stop_token_ids=(3,), seed=1)
    assert sampling_parameters(options, 4, seeded=True) == {
        "max_new_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "stop_token_ids": [3],
        "sampling_seed": seed_of(1, 4),
    }
    plain = sampling_parameters(SamplingOptions(max_response_tokens=9), 4, seeded=False)
    assert plain["top_k"] == -1  # the whole vocabulary
    assert "sampling_seed" not in plain


def test_seeds_differ_by_run_and_sample_and_fit_31_bits() -> None:
    seeds = {seed_of(run, sample) for run in range(4) for sample in range(100)}
    assert len(seeds) == 400
    assert all(0 <= seed < 1 << 31 for seed in seeds)


SHAPES = st.tuples(st.integers(1, 5), st.lists(st.integers(0, 99), min_size=1, max_size=6), st.booleans())


@given(shapes=st.lists(SHAPES, min_size=1, max_size=6), routed=st.booleans())
def test_samples_hold_what_was_asked_and_answered(shapes: list[tuple[int, list[int], bool]], routed: bool) -> None:
    requests = [
        Request(sample_id=10 + index, prompt_id=index // 2, prompt=tuple(range(prompt)))
        for index, (prompt, _, _) in enumerate(shapes)
    ]
    outputs = [
        output(tokens, [-0.5 * (1 + at) for at in range(len(tokens))], prompt=prompt, stop=stop, routed=routed)
        for prompt, tokens, stop in shapes
    ]
    batch = batch_of(requests, responses(outputs, ROUTED if routed else None), version=3)
    assert batch.problems() == []
    assert (batch.weight_version == 3).all()
    for index, (prompt, tokens, stop) in enumerate(shapes):
        assert batch.sequence(index).tolist() == [*range(prompt), *tokens]
        assert batch.stopped[index] == stop
        if routed:
            rows = batch.routing[batch.start[index] : batch.start[index] + batch.length[index]]
            fed = prompt + len(tokens) - 1
            expected = (np.arange(fed * 6).reshape(fed, 3, 2) % 8)[:, [1, 2]]
            assert (rows[:-1] == expected).all()
            assert (rows[-1] == 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: made["meta_info"].update(finish_reason={"type": "abort", "message": "Aborted"}), "Aborted"),
        (lambda made: made["meta_info"].update(finish_reason=None), "not finished"),
        (lambda made: made["meta_info"]["output_token_logprobs"].pop(), "1 log-probs that are not those of its 2 tokens"),
        (lambda made: made.update(output_ids=[7, 9]), "not those of the tokens"),
        (lambda made: made["meta_info"].update(output_token_logprobs=[(float("nan"), 7, None), (-1.0, 8, None)]), "not finite"),
        (lambda made: made["meta_info"].pop("routed_experts"), "without its experts"),
        (lambda made: made["meta_info"].update(routed_experts=base64.b64encode(bytes(4)).decode()), "1 expert ids, not 3"),
        (
            lambda made: made["meta_info"].update(
                routed_experts=base64.b64encode(np.full(18, 8, dtype=np.int32).tobytes()).decode()
            ),
            "expert 8 of 8",
        ),
    ],
)
def test_answers_that_cannot_be_used_are_named(change: Any, words: str) -> None:
    made = output([7, 8], [-1.0, -2.0], routed=True)
    change(made)
    with pytest.raises(EngineError, match=words):
        responses([made], ROUTED)


def test_as_many_answers_as_requests() -> None:
    with pytest.raises(EngineError, match="1 responses to 0 requests"):
        batch_of([], responses([output([7], [-1.0])], None), version=0)
