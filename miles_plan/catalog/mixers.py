"""Token mixers: every way a layer lets positions see each other, with its parameters, cache and state sizes.

Parameters are split into what tensor parallelism divides and what every rank keeps, because both sides of an RL job
need the difference: a DeepSeek latent down-projection is copied to every rank, its heads are not.
Sources of the shapes: Hugging Face transformers 5.x modelling files of the same families and Megatron-core 0.19.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexer:
    """The small attention that picks which keys a sparse layer reads (DeepSeek-V3.2 "lightning indexer")."""

    heads: int
    head_dim: int
    topk_tokens: int

    def params(self, hidden: int, query_dim: int) -> int:
        """Query from the query latent, one shared key with its LayerNorm, and one weight a head."""
        return query_dim * self.heads * self.head_dim + hidden * self.head_dim + 2 * self.head_dim + hidden * self.heads


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQuery:
    """Softmax attention with shared key/value heads; `kv_heads == heads` is plain multi-head attention.

    window_tokens: keys a query sees, 0 = all before it. output_gate: the query projection also makes a gate as wide as
    itself (Qwen3-Next). value_is_key: no value projection (Gemma 4 global layers). qk_norm: none, one weight a head
    dimension, or one over all heads (MiniMax M2). value_norm: values are normalised too, without a weight (Gemma 4).
    extra_params: small replicated parameters no size explains (sinks, relative positions, short convolutions).
    """

    kind: ClassVar[str] = "gqa"
    heads: int
    kv_heads: int
    head_dim: int
    window_tokens: int = 0
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    output_gate: bool = False
    value_is_key: bool = False
    value_norm: bool = False
    extra_params: int = 0

    @property
    def query_dim(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key heads; values are as wide."""
        return self.kv_heads * self.head_dim

    def sharded_params(self, hidden: int) -> int:
        """Projections (and their biases), split over tensor-parallel ranks."""
        projected = self.query_dim * (2 if self.output_gate else 1) + self.kv_dim * (1 if self.value_is_key else 2)
        return projected * (hidden + (1 if self.qkv_bias else 0)) + self.query_dim * hidden

    def replicated_params(self, hidden: int) -> int:
        """Norms, output bias and extras, whole on every rank."""
        norm = {"none": 0, "head": 2 * self.head_dim, "full": self.query_dim + self.kv_dim}[self.qk_norm]
        return norm + (hidden if self.output_bias else 0) + self.extra_params

    @property
    def score_flops_per_pair(self) -> int:
        """Forward FLOPs of one query token with one key token, all heads: 2 for QK^T and 2 for PV a dimension."""
        return 4 * self.query_dim

    @property
    def cache_elements_per_token(self) -> int:
        """Key and value elements one token leaves in the cache; a window bounds the tokens, not this."""
        return 2 * self.kv_dim

    @property
    def state_elements_per_request(self) -> int:
        """State that does not grow with the sequence."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiLatent:
    """Multi-head latent attention (DeepSeek-V2): keys and values are rebuilt from one latent a token.

    q_lora_rank 0 means a direct query projection. indexer: DeepSeek sparse attention on top.
    """

    kind: ClassVar[str] = "mla"
    heads: int
    q_lora_rank: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    indexer: Indexer | None = None

    window_tokens: ClassVar[int] = 0

    @property
    def query_dim(self) -> int:
        """Width of all query heads, rotary part included."""
        return self.heads * (self.nope_dim + self.rope_dim)

    def sharded_params(self, hidden: int) -> int:
        """Up-projections and output projection, split by heads."""
        query_in = self.q_lora_rank or hidden
        up = query_in * self.query_dim + self.kv_lora_rank * self.heads * (self.nope_dim + self.value_dim)
        return up + self.heads * self.value_dim * hidden

    def replicated_params(self, hidden: int) -> int:
        """Down-projections with their norms and the indexer, whole on every tensor-parallel rank."""
        down = hidden * (self.kv_lora_rank + self.rope_dim) + self.kv_lora_rank
        if self.q_lora_rank:
            down += hidden * self.q_lora_rank + self.q_lora_rank
        return down + (self.indexer.params(hidden, self.q_lora_rank or hidden) if self.indexer else 0)

    @property
    def score_flops_per_pair(self) -> int:
        """Forward FLOPs of one query-key pair in the expanded (training, prefill) form."""
        return 2 * self.heads * (self.nope_dim + self.rope_dim + self.value_dim)

    @property
    def absorbed_flops_per_pair(self) -> int:
        """Forward FLOPs of one pair in the absorbed (decode) form: scores and values both over the latent."""
        return 2 * self.heads * (2 * self.kv_lora_rank + self.rope_dim)

    @property
    def cache_elements_per_token(self) -> int:
        """Latent, rotary key, and the indexer's key."""
        return self.kv_lora_rank + self.rope_dim + (self.indexer.head_dim if self.indexer else 0)

    @property
    def state_elements_per_request(self) -> int:
        """State that does not grow with the sequence."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedLatent:
    """DeepSeek-V4 attention: one shared key/value head, a sliding window, and compressed blocks of older tokens.

    compress_ratio: tokens folded into one compressed entry; 0 keeps only the window. The indexer, present where the
    ratio is small, picks which compressed entries a query reads.
    """

    kind: ClassVar[str] = "compressed"
    heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    output_groups: int
    output_lora_rank: int
    window_tokens: int
    compress_ratio: int
    indexer: Indexer | None = None

    @property
    def query_dim(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    def sharded_params(self, hidden: int) -> int:
        """Query up-projection and the grouped output projection, split by heads."""
        out = self.query_dim * self.output_lora_rank + self.output_groups * self.output_lora_rank * hidden
        return self.q_lora_rank * self.query_dim + out

    def replicated_params(self, hidden: int) -> int:
        """Latents, the shared key/value, compressor and indexer, whole on every rank."""
        own = hidden * (self.q_lora_rank + self.head_dim) + self.q_lora_rank + self.head_dim + self.heads
        return own + self._compressor_params(hidden) + self._indexer_params(hidden)

    def _compressor_params(self, hidden: int) -> int:
        if not self.compress_ratio:
            return 0
        width = self.head_dim * (2 if self.indexer else 1)  # overlapping blocks where the ratio is small
        return 2 * hidden * width + self.compress_ratio * width + self.head_dim

    def _indexer_params(self, hidden: int) -> int:
        if self.indexer is None:
            return 0
        width = 2 * self.indexer.head_dim
        own = 2 * hidden * width + self.compress_ratio * width + self.indexer.head_dim
        return own + self.q_lora_rank * self.indexer.heads * self.indexer.head_dim + hidden * self.indexer.heads

    @property
    def score_flops_per_pair(self) -> int:
        """Forward FLOPs of one query-key pair, keys and values shared."""
        return 4 * self.query_dim

    @property
    def cache_elements_per_token(self) -> int:
        """Cache one token adds beyond the window: its share of a compressed entry and of the indexer's key."""
        if not self.compress_ratio:
            return 0
        entry = self.head_dim + (self.indexer.head_dim if self.indexer else 0)
        return -(-entry // self.compress_ratio)

    @property
    def state_elements_per_request(self) -> int:
        """The window's keys, which every request holds once it is long enough."""
        return self.window_tokens * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDelta:
    """Gated delta-rule linear attention (Qwen3-Next, Qwen3.5): a constant matrix state a value head."""

    kind: ClassVar[str] = "gdn"
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int = 4

    window_tokens: ClassVar[int] = 0

    @property
    def keys_width(self) -> int:
        """Width of all key heads; queries are as wide."""
        return self.key_heads * self.key_dim

    @property
    def values_width(self) -> int:
        """Width of all value heads; the output gate is as wide."""
        return self.value_heads * self.value_dim

    def sharded_params(self, hidden: int) -> int:
        """Input and output projections, convolution and gates, split by heads."""
        conv = (2 * self.keys_width + self.values_width) * self.conv_kernel
        gates = 2 * self.value_heads * (hidden + 1)
        return hidden * (2 * self.keys_width + 3 * self.values_width) + conv + gates

    def replicated_params(self, hidden: int) -> int:
        """The gated norm's weight."""
        return self.value_dim

    @property
    def score_flops_per_pair(self) -> int:
        """No pairwise scores."""
        return 0

    @property
    def cache_elements_per_token(self) -> int:
        """Nothing grows with the sequence."""
        return 0

    @property
    def state_elements_per_request(self) -> int:
        """Recurrent state and the convolution's last inputs."""
        conv = (2 * self.keys_width + self.values_width) * (self.conv_kernel - 1)
        return self.value_heads * self.key_dim * self.value_dim + conv


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2:
    """Mamba-2 state-space layer (Nemotron-H)."""

    kind: ClassVar[str] = "mamba"
    heads: int
    head_dim: int
    groups: int
    state_dim: int
    conv_kernel: int = 4

    window_tokens: ClassVar[int] = 0

    @property
    def inner_width(self) -> int:
        """Width of the state-space input."""
        return self.heads * self.head_dim

    def sharded_params(self, hidden: int) -> int:
        """Projections, convolution, per-head scalars and the gated norm, split by heads."""
        mixed = self.inner_width + 2 * self.groups * self.state_dim
        into = hidden * (self.inner_width + mixed + self.heads)
        return into + mixed * (self.conv_kernel + 1) + 3 * self.heads + self.inner_width * (hidden + 1)

    def replicated_params(self, hidden: int) -> int:
        """Nothing is replicated."""
        return 0

    @property
    def score_flops_per_pair(self) -> int:
        """No pairwise scores."""
        return 0

    @property
    def cache_elements_per_token(self) -> int:
        """Nothing grows with the sequence."""
        return 0

    @property
    def state_elements_per_request(self) -> int:
        """State matrix and the convolution's last inputs."""
        conv = (self.inner_width + 2 * self.groups * self.state_dim) * (self.conv_kernel - 1)
        return self.inner_width * self.state_dim + conv


Mixer = GroupedQuery | MultiLatent | CompressedLatent | GatedDelta | Mamba2
MIXERS: dict[str, type[Mixer]] = {each.kind: each for each in (GroupedQuery, MultiLatent, CompressedLatent, GatedDelta, Mamba2)}
