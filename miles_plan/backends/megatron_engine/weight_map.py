"""Hugging Face tensors and Megatron's parameters: which slice of which tensor stands where, for any layout.

`local_parameters` is the one map between the two, used to load, to export, and to put weights of one layout into another. Names
and shapes: megatron.core.models.gpt (0.19); the query, key and value rows of one group stand together
(megatron.core.transformer.attention, get_query_key_value_tensors), gate above up in linear_fc1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from miles_plan.backends.megatron_engine.options import LayerSpec
from miles_plan.backends.megatron_engine.ranks import ModelChunk, RankPlace, chunks_of_stage, place_of_rank
from miles_plan.backends.training.decoder_config import DecoderConfig
from miles_plan.ir.layout import TrainLayout

VOCAB_MULTIPLE = 128  # Megatron's make-vocab-size-divisible-by: its tables are padded to this times tp


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows or columns start .. stop - 1 along `dim` of a Hugging Face tensor, at `offset` along `dim` of a local one."""

    name: str
    dim: int
    start: int
    stop: int
    offset: int

    def of_full(self, full: Tensor) -> Tensor:
        """This slice of the full tensor."""
        return full.narrow(self.dim, self.start, self.stop - self.start)

    def of_local(self, local: Tensor) -> Tensor:
        """Its place in the local tensor."""
        return local.narrow(self.dim, self.offset, self.stop - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalParameter:
    """One parameter of a rank: the model chunk and name it has in Megatron, its shape, and what it is made of.

    owned: of all ranks that hold these values, this one hands them out; every element of every Hugging Face tensor has exactly
    one owner in the world. Elements that no piece covers are padding and zero.
    """

    chunk: int
    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    owned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """What the map needs of a rank."""

    config: DecoderConfig
    layout: TrainLayout
    place: RankPlace
    layers: LayerSpec

    @property
    def fused_norms(self) -> bool:
        return self.layers == "transformer_engine"

    def owns(self, *, split: bool, expert: bool = False) -> bool:
        """Replica 0 owns; of values that tensor-parallel ranks hold alike, their rank 0 does."""
        if expert:
            return self.place.expert_dp == 0 and (split or self.place.etp == 0)
        return self.place.dp == 0 and self.place.cp == 0 and (split or self.place.tp == 0)


def padded_vocab_size(vocab_size: int, tp: int, layers: LayerSpec) -> int:
    """Rows of Megatron's embedding and output tables over all tp ranks; our kernels want the vocabulary itself."""
    multiple = tp if layers == "batch_invariant" else VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def local_parameters(config: DecoderConfig, layout: TrainLayout, rank: int, *, layers: LayerSpec) -> tuple[LocalParameter, ...]:
    """All parameters of a world rank, chunk by chunk, in model order."""
    place = place_of_rank(layout, rank)
    what = _Rank(config=config, layout=layout, place=place, layers=layers)
    found: list[LocalParameter] = []
    for number, chunk in enumerate(chunks_of_stage(layout, config.num_layers, place.pp)):
        found.extend(_chunk(what, number, chunk))
    return tuple(found)


def load_local(parameter: LocalParameter, local: Tensor, full: Mapping[str, Tensor]) -> None:
    """Fill a local tensor from full tensors by name; padding becomes zero."""
    local.zero_()
    for piece in parameter.pieces:
        piece.of_local(local).copy_(piece.of_full(full[piece.name]))


def _chunk(what: _Rank, number: int, chunk: ModelChunk) -> Iterator[LocalParameter]:
    config = what.config
    if chunk.first:
        yield _table(what, number, "embedding.word_embeddings.weight", "model.embed_tokens.weight", copy=False)
    for index, layer in enumerate(chunk.layers):
        yield from _attention(what, number, f"decoder.layers.{index}", f"model.layers.{layer}")
        yield from _feed_forward(what, number, f"decoder.layers.{index}", f"model.layers.{layer}", layer)
    if not chunk.last:
        return
    yield _whole(what, number, "decoder.final_layernorm.weight", "model.norm.weight", config.hidden_size)
    if not config.tied_embeddings:
        yield _table(what, number, "output_layer.weight", "lm_head.weight", copy=False)
    elif not chunk.first:
        yield _table(what, number, "output_layer.weight", "model.embed_tokens.weight", copy=True)


def _table(what: _Rank, number: int, name: str, full: str, *, copy: bool) -> LocalParameter:
    """A tp rank's rows of a vocabulary table. copy: the last stage's second table of tied embeddings."""
    share = padded_vocab_size(what.config.vocab_size, what.layout.tp, what.layers) // what.layout.tp
    start = min(what.place.tp * share, what.config.vocab_size)
    stop = min((what.place.tp + 1) * share, what.config.vocab_size)
    pieces = (Piece(name=full, dim=0, start=start, stop=stop, offset=0),) if stop > start else ()
    shape = (share, what.config.hidden_size)
    return LocalParameter(chunk=number, name=name, shape=shape, pieces=pieces, owned=what.owns(split=True) and not copy)


def _whole(what: _Rank, number: int, name: str, full: str, *shape: int) -> LocalParameter:
    """A tensor that every tensor-parallel rank holds whole."""
    pieces = (Piece(name=full, dim=0, start=0, stop=shape[0], offset=0),)
    return LocalParameter(chunk=number, name=name, shape=shape, pieces=pieces, owned=what.owns(split=False))


def _attention(what: _Rank, number: int, local: str, full: str) -> Iterator[LocalParameter]:
    config, tp, tp_rank = what.config, what.layout.tp, what.place.tp
    local_attention, full_attention = f"{local}.self_attention", f"{full}.self_attn"
    norm = f"{local_attention}.linear_qkv.layer_norm_weight" if what.fused_norms else f"{local}.input_layernorm.weight"
    yield _whole(what, number, norm, f"{full}.input_layernorm.weight", config.hidden_size)
    groups = config.num_kv_heads // tp
    own = range(tp_rank * groups, (tp_rank + 1) * groups)
    rows = groups * (config.num_heads // config.num_kv_heads + 2) * config.head_dim
    kinds = ["weight", *(["bias"] if config.qkv_bias else [])]
    for kind in kinds:
        yield LocalParameter(
            chunk=number,
            name=f"{local_attention}.linear_qkv.{kind}",
            shape=(rows, config.hidden_size) if kind == "weight" else (rows,),
            pieces=tuple(_qkv_pieces(config, own, full_attention, kind)),
            owned=what.owns(split=tp > 1),
        )
    if config.query_key_norm:
        for head, part in (("q_layernorm", "q_norm"), ("k_layernorm", "k_norm")):
            yield _whole(what, number, f"{local_attention}.{head}.weight", f"{full_attention}.{part}.weight", config.head_dim)
    inner = config.num_heads * config.head_dim
    columns = inner // tp
    piece = Piece(
        name=f"{full_attention}.o_proj.weight", dim=1, start=tp_rank * columns, stop=(tp_rank + 1) * columns, offset=0
    )
    yield LocalParameter(
        chunk=number,
        name=f"{local_attention}.linear_proj.weight",
        shape=(config.hidden_size, columns),
        pieces=(piece,),
        owned=what.owns(split=tp > 1),
    )


def _qkv_pieces(config: DecoderConfig, groups: range, attention: str, kind: str) -> Iterator[Piece]:
    """Group by group: the query heads that share a key, that key, that value."""
    sizes = {"q_proj": config.num_heads // config.num_kv_heads * config.head_dim, "k_proj": config.head_dim}
    sizes["v_proj"] = config.head_dim
    offset = 0
    for group in groups:
        for name, rows in sizes.items():
            start = group * rows
            yield Piece(name=f"{attention}.{name}.{kind}", dim=0, start=start, stop=start + rows, offset=offset)
            offset += rows


def _feed_forward(what: _Rank, number: int, local: str, full: str, layer: int) -> Iterator[LocalParameter]:
    config = what.config
    is_moe = layer in config.moe_layers
    fused = what.fused_norms and not is_moe
    norm = f"{local}.mlp.linear_fc1.layer_norm_weight" if fused else f"{local}.pre_mlp_layernorm.weight"
    yield _whole(what, number, norm, f"{full}.post_attention_layernorm.weight", config.hidden_size)
    if not is_moe:
        names = (f"{local}.mlp.linear_fc1.weight", f"{local}.mlp.linear_fc2.weight")
        place = (what.place.tp, what.layout.tp)
        yield from _gated(what, number, names, f"{full}.mlp", config.intermediate_size, place, expert=False)
        return
    shape = (config.num_experts, config.hidden_size)
    yield _whole(what, number, f"{local}.mlp.router.weight", f"{full}.mlp.gate.weight", *shape)
    own = config.num_experts // what.layout.ep
    experts = f"{local}.mlp.experts"
    for index in range(own):
        names = (f"{experts}.local_experts.{index}.linear_fc1.weight", f"{experts}.local_experts.{index}.linear_fc2.weight")
        if what.layers == "transformer_engine":
            names = (f"{experts}.linear_fc1.weight{index}", f"{experts}.linear_fc2.weight{index}")
        expert = f"{full}.mlp.experts.{what.place.ep * own + index}"
        place = (what.place.etp, what.layout.etp)
        yield from _gated(what, number, names, expert, config.expert_intermediate_size, place, expert=True)


def _gated(
    what: _Rank, number: int, names: tuple[str, str], full: str, inner: int, place: tuple[int, int], *, expert: bool
) -> Iterator[LocalParameter]:
    """linear_fc1 (gate above up) and linear_fc2 of one feed-forward block, split over `place` = (rank, ranks)."""
    hidden, (rank, ranks) = what.config.hidden_size, place
    own = inner // ranks
    start, stop = rank * own, (rank + 1) * own
    owned = what.owns(split=ranks > 1, expert=expert)
    rows = (
        Piece(name=f"{full}.gate_proj.weight", dim=0, start=start, stop=stop, offset=0),
        Piece(name=f"{full}.up_proj.weight", dim=0, start=start, stop=stop, offset=own),
    )
    yield LocalParameter(chunk=number, name=names[0], shape=(2 * own, hidden), pieces=rows, owned=owned)
    columns = (Piece(name=f"{full}.down_proj.weight", dim=1, start=start, stop=stop, offset=0),)
    yield LocalParameter(chunk=number, name=names[1], shape=(hidden, own), pieces=columns, owned=owned)
