"""SGLang's attention backend and sampler on the kernels, over stand-ins for the classes that they extend."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from miles_plan.kernels.cuda.attention import attention
from miles_plan.kernels.cuda.log_prob import log_prob, log_softmax
from miles_plan.kernels.cuda.sample import sample

HEADS, KV_HEADS, D, PAGE, PAGES, REQUESTS, LONGEST = 4, 2, 16, 8, 20, 5, 64


class AttentionBackend:
    """sglang.srt.layers.attention.base_attn_backend.AttentionBackend."""


class Sampler(torch.nn.Module):
    """sglang.srt.layers.sampler.Sampler."""

    def __init__(self) -> None:
        super().__init__()
        self.output_logprob_processor = SimpleNamespace(compute_logprobs=lambda table, *_: LogprobResult(table))
        self.synced: list[torch.Tensor] = []

    def _preprocess_logits(self, logits: torch.Tensor, _: Any) -> torch.Tensor:
        return logits

    def _sync_token_ids_across_tp(self, tokens: torch.Tensor, _: Any) -> None:
        self.synced.append(tokens)


class LogprobResult:
    """sglang.srt.layers.logprob_processor.LogprobResult."""

    def __init__(self, table: torch.Tensor | None = None) -> None:
        self.table = table
        self.token_logprobs: torch.Tensor | None = None

    def write_output_to(self, output: Any) -> None:
        output.table, output.next_token_logprobs = self.table, self.token_logprobs


MODULES: dict[str, dict[str, Any]] = {
    "sglang": {}, "sglang.srt": {}, "sglang.srt.layers": {}, "sglang.srt.layers.attention": {}, "sglang.srt.mem_cache": {},
    "sglang.srt.layers.attention.base_attn_backend": {"AttentionBackend": AttentionBackend},
    "sglang.srt.layers.logprob_processor": {"LogprobResult": LogprobResult},
    "sglang.srt.layers.sampler": {"Sampler": Sampler},
    "sglang.srt.mem_cache.memory_pool": {"KVWriteLoc": lambda places, _: places},
}  # fmt: skip


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, made over the stand-ins and forgotten afterwards."""
    for name, attributes in MODULES.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    name = "miles_plan.kernels.cuda.sglang_backends"
    sys.modules.pop(name, None)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


class Pool:
    """One layer's keys and values by slot, as SGLang's MHATokenToKVPool."""

    def __init__(self) -> None:
        self.keys, self.values = (torch.full((PAGES * PAGE, KV_HEADS, D), float("nan")).bfloat16() for _ in range(2))

    def get_key_buffer(self, _: int) -> torch.Tensor:
        return self.keys

    def get_value_buffer(self, _: int) -> torch.Tensor:
        return self.values

    def set_kv_buffer(self, _: Any, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys[places], self.values[places] = keys, values


LAYER = SimpleNamespace(
    is_cross_attention=False,
    logit_cap=0.0,
    sliding_window_size=-1,
    tp_q_head_num=HEADS,
    qk_head_dim=D,
    scaling=D**-0.5,
    layer_id=0,
)


def runner(**changes: Any) -> SimpleNamespace:
    """A ModelRunner whose requests' pages are scattered over the pool."""
    pages = torch.randperm(PAGES)[: REQUESTS * 3].view(REQUESTS, 3)
    slots = (pages[:, :, None] * PAGE + torch.arange(PAGE)).reshape(REQUESTS, -1)
    table = torch.zeros(REQUESTS, LONGEST, dtype=torch.int32)
    table[:, : slots.shape[1]] = slots
    values: dict[str, Any] = {
        "use_mla_backend": False, "sliding_window_size": None, "req_to_token_pool": SimpleNamespace(req_to_token=table),
        "token_to_kv_pool": Pool(), "page_size": PAGE, "model_config": SimpleNamespace(context_len=LONGEST),
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


def batch(backend: Any, requests: list[int], prefixes: list[int], new: list[int], *, decode: bool = False) -> SimpleNamespace:
    """A ForwardBatch of `new` tokens after `prefixes` cached ones."""
    lens = [prefix + n for prefix, n in zip(prefixes, new, strict=True)]
    places = [backend.req_to_token[r, p : p + n] for r, p, n in zip(requests, prefixes, new, strict=True)]
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: decode), seq_lens=torch.tensor(lens), seq_lens_cpu=torch.tensor(lens),
        extend_seq_lens=torch.tensor(new), extend_seq_lens_cpu=new, req_pool_indices=torch.tensor(requests),
        out_cache_loc=torch.cat(places).long(), batch_size=len(requests),
    )  # fmt: skip


def drawn(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (torch.randn(length, heads, D).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


def run(backend: Any, given: SimpleNamespace, parts: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """The layer's call, as RadixAttention makes it."""
    q, k, v = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    out: torch.Tensor = backend.forward_extend(q.flatten(1), k, v, LAYER, given)
    return out


def test_chunks_prefix_hits_and_decode_give_one_prefills_bits(backends: Any) -> None:
    torch.manual_seed(0)
    backend = backends.PagedAttention(runner())
    first, second = drawn(13), drawn(9)
    whole = [attention(*sequence).flatten(1) for sequence in (first, second)]
    for prefixes, new, decode in (([0, 0], [8, 5], False), ([8, 5], [4, 3], False), ([12, 8], [1, 1], True)):
        given = batch(backend, [3, 1], prefixes, new, decode=decode)
        backend.init_forward_metadata(given)
        spans = [slice(p, p + n) for p, n in zip(prefixes, new, strict=True)]
        parts = [tuple(x[span] for x in sequence) for sequence, span in zip((first, second), spans, strict=True)]
        out = run(backend, given, parts)
        assert torch.equal(out, torch.cat([rows[span] for rows, span in zip(whole, spans, strict=True)])), prefixes


def test_a_decode_graphs_tensors_stay_where_they_are(backends: Any) -> None:
    torch.manual_seed(0)
    backend = backends.PagedAttention(runner())
    backend.init_cuda_graph_state(4, 4)
    sequence = drawn(11)
    whole = attention(*sequence).flatten(1)
    given = batch(backend, [2], [0], [10])
    backend.init_forward_metadata(given)
    run(backend, given, [tuple(x[:10] for x in sequence)])
    given = batch(backend, [2], [10], [1], decode=True)
    backend.init_forward_metadata_out_graph(given, in_capture=True)
    addresses = [tensor.data_ptr() for tensor in (backend.shape.kv_lens, backend.shape.page_table, backend.shape.q_starts)]
    backend.init_forward_metadata_out_graph(given)
    assert addresses == [
        tensor.data_ptr() for tensor in (backend.shape.kv_lens, backend.shape.page_table, backend.shape.q_starts)
    ]
    assert backend.shape.max_kv_len == LONGEST, "a captured launch serves any length"
    assert torch.equal(run(backend, given, [tuple(x[10:] for x in sequence)]), whole[10:])
    with pytest.raises(ValueError, match="allowed: decode"):
        backend.init_forward_metadata_out_graph(batch(backend, [2], [0], [3]))


def test_models_find_the_pools_by_sglangs_names(backends: Any) -> None:
    """`forward_context.get_token_to_kv_pool` and `get_req_to_token_pool`, which Qwen3-MoE asks before it rotates."""
    of = runner()
    backend = backends.PagedAttention(of)
    assert backend.token_to_kv_pool is of.token_to_kv_pool
    assert backend.req_to_token_pool is of.req_to_token_pool


def test_models_that_are_not_covered_are_refused(backends: Any) -> None:
    for changes in ({"use_mla_backend": True}, {"sliding_window_size": 128}):
        with pytest.raises(ValueError, match=r"^the model keeps latent or windowed keys"):
            backends.PagedAttention(runner(**changes))


def sampling(rows: int, **changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "temperatures": torch.ones(rows, 1), "top_ks": torch.full((rows,), 1 << 30), "top_ps": torch.ones(rows),
        "need_min_p_sampling": False, "return_sampling_masks": None, "has_custom_logit_processor": False,
        "sampling_seed": torch.arange(rows) + 7,
    }  # fmt: skip
    values |= changes
    values["need_top_k_sampling"] = bool((values["top_ks"] != 1 << 30).any())
    values["need_top_p_sampling"] = bool((values["top_ps"] != 1.0).any())
    return SimpleNamespace(**values)


def test_each_request_is_drawn_and_scored_at_its_own_temperature(backends: Any) -> None:
    torch.manual_seed(0)
    half, positions = (torch.randn(5, 320) * 3).bfloat16(), torch.arange(5) + 90
    info = sampling(5, temperatures=torch.tensor([[1.0], [0.7], [1.0], [0.7], [1.0]]), top_ks=torch.tensor([1 << 30] * 4 + [1]))
    output = SimpleNamespace(next_token_logits=half.float())
    sampler = backends.SeededSampler()
    tokens = sampler.forward(output, info, True, [0] * 5, [None] * 5, positions)
    assert tokens.dtype == torch.int32
    assert tokens is sampler.synced[0]
    for row, temperature in enumerate((1.0, 0.7, 1.0, 0.7, 0.0)):
        one = slice(row, row + 1)
        drawn = sample(half[one], info.sampling_seed[one], positions[one], temperature=temperature)
        assert tokens[row] == drawn[0]
        want = log_prob(half[one], drawn, temperature=temperature or 1.0)
        assert torch.equal(output.next_token_logprobs[one], want), "the trainer's bits, from bf16 logits"
    assert output.table is None
    sampler.forward(output, info, True, [0, 2, 0, 0, 0], [None] * 5, positions)
    assert torch.equal(output.table[1:2], log_softmax(half[1:2], temperature=0.7))


def test_requests_of_the_whole_vocabulary_are_drawn_at_once_with_the_same_bits(
    backends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    half, positions = (torch.randn(6, 320) * 3).bfloat16(), torch.arange(6) + 90
    temperatures = torch.tensor([[1.0], [0.7], [0.85], [1.3], [0.9], [1.1]])
    info = sampling(6, temperatures=temperatures)
    one_by_one, _, _ = backends.drawn_by_options(backends.Drawing(half, info.sampling_seed, positions, True), info, False)
    _, scores, _ = backends.drawn_by_options(backends.Drawing(half, info.sampling_seed, positions, True), info, False)
    output = SimpleNamespace(next_token_logits=half.float())
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    monkeypatch.setattr(torch.Tensor, "item", None)
    tokens = backends.SeededSampler().forward(output, info, True, [0] * 6, [None] * 6, positions)
    monkeypatch.undo()
    assert torch.equal(tokens, one_by_one.int())
    assert torch.equal(output.next_token_logprobs, scores)


def test_changed_logits_are_taken_as_they_are_and_min_p_is_refused(backends: Any) -> None:
    logits = torch.randn(2, 32)
    assert backends.as_computed(logits, sampling(2)).dtype == torch.bfloat16
    assert backends.as_computed(logits, sampling(2, logit_bias=torch.zeros(2, 32))) is logits
    with pytest.raises(ValueError, match=r"^min_p or return_sampling_masks is asked for"):
        backends.SeededSampler().forward(None, sampling(2, need_min_p_sampling=True), False, [0], [None], torch.zeros(2))


def test_the_plugin_registers_everything_and_takes_loaded_models_over(backends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that SGLang's registries get, and what its hook does in place of SGLang's own batch-invariant mode."""
    hooks_sglang = importlib.import_module("miles_plan.kernels.cuda.hooks_sglang")
    choices: dict[str, list[str]] = {}
    samplers: dict[str, Any] = {}
    attentions: dict[str, Any] = {}
    hooked: list[tuple[Any, ...]] = []

    class GroupCoordinator:
        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            return x

    def add(kind: str) -> Any:
        return lambda names: choices.setdefault(kind, []).extend(names)

    kinds = ("attention_backend", "deterministic_attention_backend", "radix_supported_deterministic_attention_backend")
    registry = "sglang.srt.layers.attention.attention_registry"
    found: dict[str, dict[str, Any]] = {
        "sglang.srt.server_args": {f"add_{kind}_choices": add(kind) for kind in kinds},
        "sglang.srt.distributed": {},
        "sglang.srt.distributed.parallel_state": {"GroupCoordinator": GroupCoordinator},
        registry: {"register_attention_backend": lambda name: lambda made: attentions.setdefault(name, made)},
        "sglang.srt.plugins": {},
        "sglang.srt.plugins.hook_registry": {
            "HookType": SimpleNamespace(REPLACE="replace"),
            "HookRegistry": SimpleNamespace(register=lambda *call: hooked.append(call)),
        },
    }  # fmt: skip
    for name, attributes in found.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    sampler_module = sys.modules["sglang.srt.layers.sampler"]
    monkeypatch.setattr(sampler_module, "register_sampler_backend", samplers.__setitem__, raising=False)
    monkeypatch.setenv(hooks_sglang.SWITCH, "1")
    hooks_sglang.plugin()
    hooks_sglang.plugin()
    assert set(attentions) == {"miles_plan"}
    assert set(samplers) == {"miles_plan", "pytorch"}
    assert all("miles_plan" in choices[kind] for kind in kinds)
    assert hasattr(GroupCoordinator.all_reduce, "__wrapped__")
    assert not hasattr(GroupCoordinator.all_reduce.__wrapped__, "__wrapped__"), "wrapped once"
    (target, take_over, kind), _ = hooked
    assert target.endswith("ModelRunner.maybe_enable_batch_invariant_mode")
    assert kind == "replace"
    taken: list[object] = []
    monkeypatch.setattr(hooks_sglang, "install", lambda model, rope_parameters: taken.extend((model, rope_parameters)))
    config = SimpleNamespace(hf_config=SimpleNamespace(rope_parameters={"rope_type": "default"}))
    take_over(SimpleNamespace(model="the model", model_config=config))
    assert taken == ["the model", {"rope_type": "default"}]
