"""What an engine runs with, against what it was asked: every difference has a name."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from miles_plan.backends.engine import EngineError
from miles_plan.backends.sglang_engine.read_back import check, differences

ASKED: dict[str, Any] = {
    "model_path": "model",
    "dtype": "bfloat16",
    "dp_size": 1,
    "mem_fraction_static": 0.1,
    "max_total_tokens": 1000,
    "max_running_requests": 512,
    "chunked_prefill_size": 8192,
    "page_size": 16,
    "cuda_graph_max_bs_decode": 256,
    "disable_prefill_cuda_graph": True,
}
STATE: dict[str, Any] = {
    **{name: ASKED[name] for name in ("dtype", "mem_fraction_static", "chunked_prefill_size", "page_size", "max_total_tokens")},
    "max_running_requests": 512,
    "dp_size": 1,
    "effective_max_running_requests_per_dp": 512,
    "memory_usage": {"weight": 1.19, "kvcache": 11.71, "graph": 0.32, "token_capacity": 1000},
    "cuda_graph_config": {"decode": {"backend": "full", "max_bs": 256}, "prefill": {"backend": "disabled", "max_bs": None}},
}
INFO = {"version": "0.5.16", "internal_states": [STATE]}


def changed(**change: Any) -> dict[str, Any]:
    info = copy.deepcopy(INFO)
    info["internal_states"][0].update(change)
    return info


def test_an_engine_that_runs_as_asked_gives_its_facts() -> None:
    facts = check(ASKED, INFO)
    assert (facts.version, facts.pool_tokens, facts.max_running) == ("0.5.16", 1000, 512)
    assert facts.pool_bytes == int(11.71 * (1 << 30))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"page_size": 1}, "page_size: asked for 16, runs with 1"),
        ({"dtype": "float16"}, "dtype: asked for 'bfloat16', runs with 'float16'"),
        ({"mem_fraction_static": 0.085}, "mem_fraction_static"),
        ({"effective_max_running_requests_per_dp": 300}, "requests at a time: asked for 512, runs with 300"),
        ({"memory_usage": {**STATE["memory_usage"], "token_capacity": 900}}, "the plan has 1000 tokens, 900 found room"),
        ({"cuda_graph_config": {**STATE["cuda_graph_config"], "prefill": {"backend": "breakable"}}}, "CUDA graphs of prefill"),
        ({"cuda_graph_config": {**STATE["cuda_graph_config"], "decode": {"max_bs": 160}}}, "captured up to 160"),
    ],
)
def test_a_difference_is_named(change: dict[str, Any], words: str) -> None:
    (found,) = differences(ASKED, changed(**change))
    assert words in found
    with pytest.raises(EngineError, match="does not run as it was asked"):
        check(ASKED, changed(**change))


def test_all_differences_are_listed_at_once() -> None:
    assert len(list(differences(ASKED, changed(page_size=1, dtype="float16")))) == 2


def test_a_cache_that_lost_less_than_the_plans_own_accuracy_is_fine() -> None:
    assert list(differences(ASKED, changed(memory_usage={**STATE["memory_usage"], "token_capacity": 976}))) == []
    assert list(differences(ASKED, changed(memory_usage={**STATE["memory_usage"], "token_capacity": 1008}))) == []
