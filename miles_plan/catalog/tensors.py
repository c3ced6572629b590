"""A model's weights as tensors: name patterns of the Hugging Face checkpoint, shapes, counts, and the axis that tp splits.

Patterns hold `{}` where the layer (and the expert) number stands. Fused projections of checkpoints that fuse them are listed as
their parts: what travels between engines are the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from miles_plan.catalog.architecture import LayerKind, ModelArchitecture
from miles_plan.catalog.ffns import DenseFfn, MoeFfn
from miles_plan.catalog.mixers import GroupedQuery, MultiLatent

Split = Literal["columns", "rows", "whole", "expert_columns", "expert_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPattern:
    """`count` tensors of one shape. split: what tensor parallelism cuts: columns is axis 0 (outputs), rows axis 1 (inputs)."""

    pattern: str
    count: int
    shape: tuple[int, ...]
    split: Split

    @property
    def num_elements(self) -> int:
        """Elements of all `count` tensors."""
        total = self.count
        for size in self.shape:
            total *= size
        return total

    @property
    def axis(self) -> int | None:
        """The axis that tensor parallelism splits, None for replicated tensors."""
        return {"columns": 0, "expert_columns": 0, "rows": 1, "expert_rows": 1, "whole": None}[self.split]

    @property
    def of_expert(self) -> bool:
        """Whether expert parallelism decides where it lives."""
        return self.split.startswith("expert")


def weight_tensors(model: ModelArchitecture) -> tuple[TensorPattern, ...]:
    """Every weight of the model, embedding first, then layer kinds in order, head last.

    What a kind holds beyond the projections named here (gates, convolutions, biases, norms) stands as one `model.other`
    pattern, so that the elements add up to the architecture's parameter count.
    """
    embedding = TensorPattern(
        pattern="model.embed_tokens.weight", count=1, shape=(model.vocab_size, model.hidden_size), split="columns"
    )
    layers = [pattern for kind, count in model.layers() for pattern in _layer(model, kind, count)]
    head = (
        []
        if model.tie_embeddings
        else [TensorPattern(pattern="lm_head.weight", count=1, shape=(model.vocab_size, model.hidden_size), split="columns")]
    )
    found = [embedding, *layers, *head]
    rest = model.params_total - sum(pattern.num_elements for pattern in found)
    if rest > 0:
        found.append(TensorPattern(pattern="model.other", count=1, shape=(rest,), split="whole"))
    return tuple(found)


def _layer(model: ModelArchitecture, kind: LayerKind, count: int) -> Iterator[TensorPattern]:
    hidden = model.hidden_size
    mixer, ffn = kind.mixer, kind.ffn
    if isinstance(mixer, GroupedQuery):
        yield from _grouped_query(mixer, hidden, count)
    elif isinstance(mixer, MultiLatent):
        yield from _multi_latent(mixer, hidden, count)
    elif mixer is not None:
        yield _lump(f"model.layers.{{}}.{mixer.kind}", count, mixer.sharded_params(hidden), "columns")
        yield _lump(f"model.layers.{{}}.{mixer.kind}.replicated", count, mixer.replicated_params(hidden), "whole")
    if isinstance(ffn, DenseFfn):
        yield from _mlp("model.layers.{}.mlp", ffn.gated, hidden, ffn.size, count)
    elif isinstance(ffn, MoeFfn):
        yield from _experts(ffn, hidden, count)


def _grouped_query(mixer: GroupedQuery, hidden: int, count: int) -> Iterator[TensorPattern]:
    stem = "model.layers.{}.self_attn"
    query = mixer.heads * mixer.head_dim * (2 if mixer.output_gate else 1)
    key = mixer.kv_heads * mixer.head_dim
    yield TensorPattern(pattern=f"{stem}.q_proj.weight", count=count, shape=(query, hidden), split="columns")
    for name in ("k_proj",) if mixer.value_is_key else ("k_proj", "v_proj"):
        yield TensorPattern(pattern=f"{stem}.{name}.weight", count=count, shape=(key, hidden), split="columns")
    yield TensorPattern(
        pattern=f"{stem}.o_proj.weight", count=count, shape=(hidden, mixer.heads * mixer.head_dim), split="rows"
    )


def _multi_latent(mixer: MultiLatent, hidden: int, count: int) -> Iterator[TensorPattern]:
    stem = "model.layers.{}.self_attn"
    query = mixer.heads * (mixer.nope_dim + mixer.rope_dim)
    if mixer.q_lora_rank:
        yield TensorPattern(pattern=f"{stem}.q_a_proj.weight", count=count, shape=(mixer.q_lora_rank, hidden), split="whole")
        yield TensorPattern(pattern=f"{stem}.q_b_proj.weight", count=count, shape=(query, mixer.q_lora_rank), split="columns")
    else:
        yield TensorPattern(pattern=f"{stem}.q_proj.weight", count=count, shape=(query, hidden), split="columns")
    latent = mixer.kv_lora_rank + mixer.rope_dim
    yield TensorPattern(pattern=f"{stem}.kv_a_proj_with_mqa.weight", count=count, shape=(latent, hidden), split="whole")
    expanded = mixer.heads * (mixer.nope_dim + mixer.value_dim)
    yield TensorPattern(pattern=f"{stem}.kv_b_proj.weight", count=count, shape=(expanded, mixer.kv_lora_rank), split="columns")
    output = mixer.heads * mixer.value_dim
    yield TensorPattern(pattern=f"{stem}.o_proj.weight", count=count, shape=(hidden, output), split="rows")


def _mlp(stem: str, gated: bool, hidden: int, size: int, count: int, *, expert: bool = False) -> Iterator[TensorPattern]:
    columns: Split = "expert_columns" if expert else "columns"
    rows: Split = "expert_rows" if expert else "rows"
    for name in ("gate_proj", "up_proj") if gated else ("up_proj",):
        yield TensorPattern(pattern=f"{stem}.{name}.weight", count=count, shape=(size, hidden), split=columns)
    yield TensorPattern(pattern=f"{stem}.down_proj.weight", count=count, shape=(hidden, size), split=rows)


def _experts(ffn: MoeFfn, hidden: int, count: int) -> Iterator[TensorPattern]:
    yield TensorPattern(pattern="model.layers.{}.mlp.gate.weight", count=count, shape=(ffn.experts, hidden), split="whole")
    width = ffn.expert_input(hidden)
    yield from _mlp("model.layers.{}.mlp.experts.{}", ffn.gated, width, ffn.size, count * ffn.experts, expert=True)
    if ffn.shared_size:
        yield from _mlp("model.layers.{}.mlp.shared_experts", ffn.gated, hidden, ffn.shared_size, count)


def _lump(pattern: str, count: int, num_elements: int, split: Split) -> TensorPattern:
    return TensorPattern(pattern=f"{pattern}.weight", count=count, shape=(max(num_elements, 0), 1), split=split)
