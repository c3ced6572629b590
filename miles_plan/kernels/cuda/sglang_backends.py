"""SGLang's attention backend and sampler on this package's kernels.

Needs sglang (written against 0.5.16), which `hooks_sglang` imports only when asked to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.logprob_processor import LogprobResult
from sglang.srt.layers.sampler import Sampler
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from .attention import attention
from .log_prob import log_prob, log_softmax
from .sample import sample


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What `attention` needs to know of a batch, made once a forward; int32 on the device, and two bounds on the host."""

    q_starts: torch.Tensor
    kv_lens: torch.Tensor
    page_table: torch.Tensor
    max_q_len: int
    max_kv_len: int


class PagedAttention(AttentionBackend):
    """`attention` over SGLang's paged pool: decode, chunked prefill and prefix hits give the bits of one whole prefill."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        if runner.use_mla_backend or getattr(runner, "sliding_window_size", None):
            raise ValueError("the model keeps latent or windowed keys; allowed: one pool of whole keys and values")
        # models ask the backend in use for these two, by these names
        self.req_to_token_pool, self.token_to_kv_pool = runner.req_to_token_pool, runner.token_to_kv_pool
        self.req_to_token: torch.Tensor = runner.req_to_token_pool.req_to_token
        self.page = int(runner.page_size)
        self.longest = int(runner.model_config.context_len)
        self.shape: BatchShape | None = None
        self.static: BatchShape | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Outside CUDA graphs."""
        decode = forward_batch.forward_mode.is_decode()
        lens = forward_batch.seq_lens.to(torch.int32)
        queries = torch.ones_like(lens) if decode else forward_batch.extend_seq_lens.to(torch.int32)
        starts = torch.zeros(lens.numel() + 1, device=lens.device, dtype=torch.int32)
        starts[1:] = torch.cumsum(queries, 0)
        longest = int(forward_batch.seq_lens_cpu.max())
        most = 1 if decode else max(forward_batch.extend_seq_lens_cpu)
        self.shape = BatchShape(starts, lens, self._pages(forward_batch.req_pool_indices, longest), int(most), longest)

    def _pages(self, requests: torch.Tensor, longest: int) -> torch.Tensor:
        """Each request's pages, from the slot of the first token in each."""
        width = -(-longest // self.page) * self.page
        return (self.req_to_token[requests, : width : self.page] // self.page).to(torch.int32).contiguous()

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Tensors that captured decode steps read; `max_num_tokens` is the same number for decode."""
        device, pages = self.req_to_token.device, -(-self.longest // self.page)
        lens = torch.ones(max_bs, device=device, dtype=torch.int32)
        table = torch.zeros(max_bs, pages, device=device, dtype=torch.int32)
        self.static = BatchShape(torch.arange(max_bs + 1, device=device, dtype=torch.int32), lens, table, 1, self.longest)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a decode step is captured or replayed: its lengths and pages into the tensors that the graph reads."""
        if not forward_batch.forward_mode.is_decode():
            raise ValueError(f"a CUDA graph is asked for {forward_batch.forward_mode}; allowed: decode")
        assert self.static is not None
        size = forward_batch.batch_size
        lens = forward_batch.seq_lens[:size]
        self.static.kv_lens[:size].copy_(lens)
        longest = 1 if in_capture else int(forward_batch.seq_lens_cpu[:size].max())
        pages = self._pages(forward_batch.req_pool_indices[:size], longest)
        self.static.page_table[:size, : pages.shape[1]].copy_(pages)
        parts = self.static.q_starts[: size + 1], self.static.kv_lens[:size], self.static.page_table[:size]
        self.shape = BatchShape(*parts, 1, self.longest)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The length of a row that no request fills."""
        return 1

    def forward_extend(
        self, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, layer: Any, forward_batch: Any,
        save_kv_cache: bool = True, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """[tokens, heads * D], keys and values written first."""
        if layer.is_cross_attention or layer.logit_cap:
            raise ValueError("the layer attends across or caps its scores; allowed: plain causal self-attention")
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        shape = self.shape
        assert shape is not None
        keys, values = (
            buffer.view(-1, self.page, *buffer.shape[1:])
            for buffer in (
                self.token_to_kv_pool.get_key_buffer(layer.layer_id),
                self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            )
        )
        window = layer.sliding_window_size
        out = attention(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim), keys, values, q_starts=shape.q_starts, kv_lens=shape.kv_lens,
            page_table=shape.page_table, max_q_len=shape.max_q_len, max_kv_len=shape.max_kv_len, scale=layer.scaling,
            window=window + 1 if window is not None and window > -1 else None,
        )  # fmt: skip
        return out.flatten(1)

    forward_decode = forward_extend


class SeededSampler(Sampler):
    """`sample` for tokens and `log_prob` for their log-probabilities, at the temperature that the tokens were drawn at."""

    def forward(
        self, logits_output: Any, sampling_info: Any, return_logprob: bool, top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int] | None], positions: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The next token of each request; writes log-probabilities into `logits_output`, as SGLang's own sampler does."""
        if sampling_info.need_min_p_sampling or any(sampling_info.return_sampling_masks or []):
            raise ValueError("min_p or return_sampling_masks is asked for; allowed: temperature, top_k and top_p")
        logits = as_computed(self._preprocess_logits(logits_output.next_token_logits, sampling_info), sampling_info)
        seeds = sampling_info.sampling_seed
        if seeds is None:
            seeds = torch.randint(0, 2**62, (logits.shape[0],), device=logits.device)
        drawing = Drawing(logits, seeds.to(torch.int64), positions.to(torch.int64), return_logprob)
        wants_table = return_logprob and (any(top_logprobs_nums) or any(ids is not None for ids in token_ids_logprobs))
        if wants_table or sampling_info.need_top_p_sampling or sampling_info.need_top_k_sampling:
            tokens, chosen, table = drawn_by_options(drawing, sampling_info, wants_table)
        else:
            tokens, chosen, table = (*drawn_at_once(drawing, sampling_info), None)
        if return_logprob:
            result = LogprobResult()
            if table is not None:
                result = self.output_logprob_processor.compute_logprobs(table, top_logprobs_nums, token_ids_logprobs, tokens)
            result.token_logprobs = chosen
            result.write_output_to(logits_output)
        tokens = tokens.to(torch.int32)
        self._sync_token_ids_across_tp(tokens, sampling_info)
        return tokens


@dataclass(frozen=True, slots=True)
class Drawing:
    """The next tokens that are asked for: bf16 or fp32 [requests, vocabulary], int64 [requests] twice, and whether to score them."""

    logits: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    scored: bool


def drawn_at_once(of: Drawing, sampling_info: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens and log-probabilities of requests that keep the whole vocabulary.

    The host reads nothing back: SGLang prepares the next step while the device computes this one.
    """
    temperatures = sampling_info.temperatures.flatten().float()
    tokens = sample(of.logits, of.seeds, of.positions, temperature=temperatures)
    return tokens, log_prob(of.logits, tokens, temperature=temperatures) if of.scored else None


def drawn_by_options(
    of: Drawing, sampling_info: Any, wants_table: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Tokens, log-probabilities and, where asked for, every token's, group by group of requests with equal options."""
    logits = of.logits
    tokens = torch.empty(logits.shape[0], device=logits.device, dtype=torch.int64)
    chosen = torch.empty(logits.shape[0], device=logits.device, dtype=torch.float32)
    table = torch.empty(logits.shape, device=logits.device, dtype=torch.float32) if wants_table else None
    for rows, temperature, top_k, top_p in rows_by_options(sampling_info, logits.shape[1]):
        part = logits[rows]
        tokens[rows] = drawn = sample(
            part, of.seeds[rows], of.positions[rows], top_k=top_k, top_p=top_p,
            temperature=0.0 if top_k == 1 else temperature,  # SGLang's way of saying greedy
        )  # fmt: skip
        if of.scored:
            chosen[rows] = log_prob(part, drawn, temperature=temperature)
        if table is not None:
            table[rows] = log_softmax(part, temperature=temperature)
    return tokens, chosen, table


def as_computed(logits: torch.Tensor, sampling_info: Any) -> torch.Tensor:
    """The bf16 logits that SGLang widened to float32, unless penalties or masks have changed them since.

    The layout of a row's sum depends on the dtype, and the trainer's logits are bf16.
    """
    changes = ("acc_additive_penalties", "acc_scaling_penalties", "vocab_mask", "logit_bias")
    changed = sampling_info.has_custom_logit_processor or any(
        getattr(sampling_info, name, None) is not None for name in changes
    )
    return logits if changed or logits.dtype != torch.float32 else logits.to(torch.bfloat16)


def rows_by_options(sampling_info: Any, vocabulary: int) -> list[tuple[torch.Tensor, float, int, float]]:
    """Requests grouped by (temperature, top_k, top_p): their rows and the three numbers; top_k 0 keeps all."""
    options = torch.stack(
        [
            sampling_info.temperatures.flatten().double(),
            sampling_info.top_ks.flatten().double(),
            sampling_info.top_ps.flatten().double(),
        ],
        1,
    )
    kinds, which = torch.unique(options, dim=0, return_inverse=True)
    found = []
    for i, (temperature, top_k, top_p) in enumerate(kinds.tolist()):
        keep = int(top_k) if 0 < top_k < vocabulary else 0
        found.append(((which == i).nonzero()[:, 0], temperature, keep, top_p))
    return found
