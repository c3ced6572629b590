"""A rank's share of the weights: which slice of which Hugging Face tensor stands where, to load, place and gather.

The decoder keeps fused tensors (query, key and value in one; gate and up in one; all local experts in one). Checkpoints
and weight exchange speak Hugging Face's names and full shapes. `parameters` is the one map between the two.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_plan.backends.torch_engine.mesh import Mesh, stage_layers
from miles_plan.backends.training.checkpoint_reader import open_tensors
from miles_plan.backends.training.decoder_config import DecoderConfig
from miles_plan.ir.layout import TrainLayout

Weights = dict[str, Tensor]

LARGE_PARAMETERS = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Which part of the model a rank holds: its slice of tp, its slice of ep, its layers, and the ends of the model."""

    tp_rank: int = 0
    tp: int = 1
    ep_rank: int = 0
    ep: int = 1
    layers: range
    first_stage: bool = True
    last_stage: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows or columns start .. stop - 1 along `dim` of a Hugging Face tensor, at `offset` along `dim` of a local one.

    `expert` is the index in the local tensor's leading dimension, or None; `sharded` tells whether other tp ranks hold
    the rest (else the tensor is whole).
    """

    name: str
    full_shape: tuple[int, ...]
    dim: int
    start: int
    stop: int
    offset: int
    expert: int | None = None
    sharded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One local tensor: its name in the decoder, its shape, and what it is made of.

    is_expert: replicated over the mesh's expert_dp group, else over its dp group.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    is_expert: bool = False


def shard_of_rank(mesh: Mesh, layout: TrainLayout, config: DecoderConfig) -> Shard:
    """The part of the model that this rank of a trainer holds."""
    return Shard(
        tp_rank=mesh.tp.rank,
        tp=mesh.tp.size,
        ep_rank=mesh.ep.rank,
        ep=mesh.ep.size,
        layers=stage_layers(layout, config.num_layers)[mesh.pp.rank],
        first_stage=mesh.pp.rank == 0,
        last_stage=mesh.pp.rank == mesh.pp.size - 1,
    )


def vocab_range(vocab_size: int, tp_rank: int, tp: int) -> tuple[int, int]:
    """First and last + 1 token of a tp rank: equal shares rounded up, the last rank takes what is left."""
    share = -(-vocab_size // tp)
    return min(vocab_size, tp_rank * share), min(vocab_size, (tp_rank + 1) * share)


def parameters(config: DecoderConfig, shard: Shard) -> tuple[Parameter, ...]:
    """All local tensors of a shard, in model order: the one order of weights everywhere."""
    found: list[Parameter] = []
    start, stop = vocab_range(config.vocab_size, shard.tp_rank, shard.tp)
    table = (config.vocab_size, config.hidden_size)
    if shard.first_stage or (shard.last_stage and config.tied_embeddings):
        found.append(_single("model.embed_tokens.weight", table, 0, start, stop, shard.tp > 1))
    for layer in shard.layers:
        found.extend(_layer_parameters(config, shard, layer))
    if shard.last_stage:
        found.append(_whole("model.norm.weight", (config.hidden_size,)))
        if not config.tied_embeddings:
            found.append(_single("lm_head.weight", table, 0, start, stop, shard.tp > 1))
    return tuple(found)


def full_names(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model with its shape, in model order."""
    whole = Shard(layers=range(config.num_layers))
    return {piece.name: piece.full_shape for parameter in parameters(config, whole) for piece in parameter.pieces}


def place(weights: Mapping[str, Tensor], owned: Mapping[str, tuple[Parameter, Piece]], name: str, full: Tensor) -> bool:
    """Copy this rank's slice of a full tensor into its place, rounding to its dtype; False when no slice of it is ours.

    `owned` is `pieces_by_name`. ValueError when the tensor's shape is not the model's.
    """
    if name not in owned:
        return False
    parameter, piece = owned[name]
    if tuple(full.shape) != piece.full_shape:
        raise ValueError(f"weight '{name}' has shape {list(full.shape)}, the model expects {list(piece.full_shape)}")
    source = full.narrow(piece.dim, piece.start, piece.stop - piece.start)
    with torch.no_grad():
        _view(weights[parameter.name], piece).copy_(source)
    return True


def pieces_by_name(found: Sequence[Parameter]) -> dict[str, tuple[Parameter, Piece]]:
    """Hugging Face name -> the local tensor and piece that hold a slice of it."""
    return {piece.name: (parameter, piece) for parameter in found for piece in parameter.pieces}


def empty_weights(found: Sequence[Parameter], dtype: torch.dtype, device: str = "cpu") -> Weights:
    """Uninitialised local tensors."""
    return {parameter.name: torch.empty(parameter.shape, dtype=dtype, device=device) for parameter in found}


def load_weights(directory: Path, config: DecoderConfig, shard: Shard, *, dtype: torch.dtype, device: str = "cpu") -> Weights:
    """This rank's tensors from a safetensors checkpoint, reading only its slices.

    ValueError names a tensor that is missing or has another shape; FileNotFoundError names a missing file.
    """
    found = parameters(config, shard)
    weights = empty_weights(found, dtype, device)
    owned = pieces_by_name(found)
    shapes = {name: piece.full_shape for name, (_, piece) in owned.items()}
    for name, source in open_tensors(directory, shapes):
        _load_piece(source, *owned[name], weights)
    return weights


def gather_full_tensors(
    weights: Mapping[str, Tensor], config: DecoderConfig, shard: Shard, mesh: Mesh
) -> Iterator[tuple[str, Tensor]]:
    """Full Hugging Face tensors of this rank's stage and experts, in model order; every rank of the tp group gets them.

    Collective over the tp group: all its ranks must run the iterator to the end. Ranks with the same pp and ep coordinates
    get the same tensors.
    """
    per_rank = [parameters(config, _replace_tp(shard, rank)) for rank in range(shard.tp)]
    for index, parameter in enumerate(per_rank[shard.tp_rank]):
        shapes = [parameters_of_rank[index].shape for parameters_of_rank in per_rank]
        parts = _gather(weights[parameter.name].detach(), shapes, mesh, any(piece.sharded for piece in parameter.pieces))
        for number, piece in enumerate(parameter.pieces):
            if not piece.sharded:
                yield piece.name, _view(parts[shard.tp_rank], piece)
                continue
            slices = [_view(part, per_rank[rank][index].pieces[number]) for rank, part in enumerate(parts)]
            yield piece.name, torch.cat(slices, dim=piece.dim)


def initialise_checkpoint(
    config: Mapping[str, Any], directory: Path, seed: int, *, large_dtype: torch.dtype = torch.float32
) -> None:
    """Random weights for this config (a config.json as a mapping), saved as safetensors.

    Up to `LARGE_PARAMETERS` they are those of the real transformers class in float32, drawn from one generator; larger models
    get the same distributions in `large_dtype`, drawn piece by piece on all cores. The same seed gives the same files. They are
    written aside and moved into place, so a directory is whole or not there. ValueError for a config that the embedded decoder
    cannot run.
    """
    from transformers import AutoConfig

    from miles_plan.backends.training.decoder_config import decoder_config

    fields = dict(config)
    kind = fields.pop("model_type", None)
    try:
        full = AutoConfig.for_model(kind, **fields)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"transformers has no model for model_type={kind!r}: {error}") from error
    shapes = full_names(decoder_config(full))
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        if sum(math.prod(shape) for shape in shapes.values()) > LARGE_PARAMETERS:
            _write_large(full, shapes, aside, seed, large_dtype)
        else:
            _write_as_transformers(full, aside, seed)
        os.replace(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_large(full: Any, shapes: Mapping[str, tuple[int, ...]], aside: Path, seed: int, dtype: torch.dtype) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from miles_plan.backends.training.random_model import write_random_weights

    write_random_weights(aside, shapes, dtype=dtype, std=float(full.initializer_range), seed=seed)
    full.architectures, full.dtype = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[full.model_type]], dtype
    full.save_pretrained(aside)


def _write_as_transformers(full: Any, aside: Path, seed: int) -> None:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto: Any = AutoModelForCausalLM  # its methods carry no annotations
        model = auto.from_config(full, dtype=torch.float32)
    with _no_progress_bar():
        model.save_pretrained(aside)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    bars: Any = logging  # its functions carry no annotations
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _layer_parameters(config: DecoderConfig, shard: Shard, layer: int) -> Iterator[Parameter]:
    prefix = f"model.layers.{layer}"
    hidden = config.hidden_size
    yield _whole(f"{prefix}.input_layernorm.weight", (hidden,))
    attention = f"{prefix}.self_attn"
    widths = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "v_proj": config.num_kv_heads}
    sizes = {name: heads * config.head_dim for name, heads in widths.items()}
    yield _stacked(f"{attention}.qkv_proj.weight", {f"{attention}.{n}.weight": (s, hidden) for n, s in sizes.items()}, shard)
    if config.qkv_bias:
        yield _stacked(f"{attention}.qkv_proj.bias", {f"{attention}.{n}.bias": (s,) for n, s in sizes.items()}, shard)
    if config.query_key_norm:
        yield _whole(f"{attention}.q_norm.weight", (config.head_dim,))
        yield _whole(f"{attention}.k_norm.weight", (config.head_dim,))
    yield _columns(f"{attention}.o_proj.weight", (hidden, sizes["q_proj"]), shard)
    if config.output_bias:
        yield _whole(f"{attention}.o_proj.bias", (hidden,))
    yield _whole(f"{prefix}.post_attention_layernorm.weight", (hidden,))
    mlp = f"{prefix}.mlp"
    if layer in config.moe_layers:
        yield _whole(f"{mlp}.gate.weight", (config.num_experts, hidden))
        yield from _expert_parameters(config, shard, mlp)
        return
    inner = (config.intermediate_size, hidden)
    yield _stacked(f"{mlp}.gate_up_proj.weight", {f"{mlp}.{n}.weight": inner for n in ("gate_proj", "up_proj")}, shard)
    yield _columns(f"{mlp}.down_proj.weight", (hidden, config.intermediate_size), shard)


def _expert_parameters(config: DecoderConfig, shard: Shard, mlp: str) -> Iterator[Parameter]:
    hidden, inner = config.hidden_size, config.expert_intermediate_size
    local = config.num_experts // shard.ep
    own = inner // shard.tp
    first = shard.ep_rank * local
    start, stop = shard.tp_rank * own, (shard.tp_rank + 1) * own
    gate_up, down = [], []
    for expert in range(local):
        name = f"{mlp}.experts.{first + expert}"
        common: dict[str, Any] = {"start": start, "stop": stop, "expert": expert, "sharded": shard.tp > 1}
        for number, part in enumerate(("gate_proj", "up_proj")):
            shape = (inner, hidden)
            gate_up.append(Piece(name=f"{name}.{part}.weight", full_shape=shape, dim=0, offset=number * own, **common))
        down.append(Piece(name=f"{name}.down_proj.weight", full_shape=(hidden, inner), dim=1, offset=0, **common))
    yield Parameter(name=f"{mlp}.experts.gate_up_proj", shape=(local, 2 * own, hidden), pieces=tuple(gate_up), is_expert=True)
    yield Parameter(name=f"{mlp}.experts.down_proj", shape=(local, hidden, own), pieces=tuple(down), is_expert=True)


def _whole(name: str, shape: tuple[int, ...]) -> Parameter:
    return _single(name, shape, 0, 0, shape[0], False)


def _columns(name: str, shape: tuple[int, int], shard: Shard) -> Parameter:
    own = shape[1] // shard.tp
    return _single(name, shape, 1, shard.tp_rank * own, (shard.tp_rank + 1) * own, shard.tp > 1)


def _single(name: str, shape: tuple[int, ...], dim: int, start: int, stop: int, sharded: bool) -> Parameter:
    local = (*shape[:dim], stop - start, *shape[dim + 1 :])
    piece = Piece(name=name, full_shape=shape, dim=dim, start=start, stop=stop, offset=0, sharded=sharded)
    return Parameter(name=name, shape=local, pieces=(piece,))


def _stacked(name: str, shapes: Mapping[str, tuple[int, ...]], shard: Shard) -> Parameter:
    """Row-sharded tensors one below the other."""
    pieces, offset = [], 0
    for full_name, shape in shapes.items():
        own = shape[0] // shard.tp
        start = shard.tp_rank * own
        pieces.append(
            Piece(
                name=full_name,
                full_shape=shape,
                dim=0,
                start=start,
                stop=start + own,
                offset=offset,
                sharded=shard.tp > 1,
            )
        )
        offset += own
    return Parameter(name=name, shape=(offset, *next(iter(shapes.values()))[1:]), pieces=tuple(pieces))


def _view(local: Tensor, piece: Piece) -> Tensor:
    part = local if piece.expert is None else local[piece.expert]
    return part.narrow(piece.dim, piece.offset, piece.stop - piece.start)


def _replace_tp(shard: Shard, tp_rank: int) -> Shard:
    return Shard(
        tp_rank=tp_rank,
        tp=shard.tp,
        ep_rank=shard.ep_rank,
        ep=shard.ep,
        layers=shard.layers,
        first_stage=shard.first_stage,
        last_stage=shard.last_stage,
    )


def _gather(local: Tensor, shapes: Sequence[tuple[int, ...]], mesh: Mesh, sharded: bool) -> list[Tensor]:
    """Every tp rank's local tensor; ranks may differ in their share of the vocabulary, so shares travel padded."""
    if not sharded:
        return [local] * len(shapes)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    padded = torch.nn.functional.pad(local.reshape(-1), (0, max(sizes) - local.numel()))
    parts = mesh.tp.all_gather(padded)
    return [part[:size].view(shape) for part, size, shape in zip(parts, sizes, shapes, strict=True)]


def _load_piece(source: Any, parameter: Parameter, piece: Piece, weights: Weights) -> None:
    own = slice(piece.start, piece.stop)
    _view(weights[parameter.name], piece).copy_(source[own] if piece.dim == 0 else source[:, own])
