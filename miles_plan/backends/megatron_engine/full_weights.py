"""Full Hugging Face tensors out of Megatron's shards, in one collective that fits every layout.

Each element of each tensor has one owner in the world (`weight_map`). Owners write their slices into zeroed bytes, and the
bytes are summed as integers over all ranks: x + 0 + ... + 0 is x, bit for bit. One all-reduce moves twice what a gather would
and needs no bookkeeping of tp x pp x ep x etp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from miles_plan.backends.megatron_engine.weight_map import LocalParameter, Piece
from miles_plan.backends.torch_engine.weights import full_names
from miles_plan.backends.training.checkpoint_reader import open_tensors
from miles_plan.backends.training.decoder_config import DecoderConfig
from miles_plan.backends.weight_transport.publisher import FullTensor
from miles_plan.ir.layout import TrainLayout

Held = Sequence[tuple[LocalParameter, Tensor]]


def full_tensors(config: DecoderConfig, dtype: torch.dtype) -> dict[str, FullTensor]:
    """Every tensor of the model, in model order."""
    return {name: FullTensor(shape, dtype) for name, shape in full_names(config).items()}


def load_held(directory: Path, config: DecoderConfig, held: Held) -> None:
    """Fill this rank's parameters from a checkpoint, reading only its slices; padding becomes zero.

    ValueError names a tensor that is missing or has another shape; FileNotFoundError names a missing file.
    """
    wanted: dict[str, list[tuple[Piece, Tensor]]] = {}
    for parameter, tensor in held:
        with torch.no_grad():
            tensor.zero_()
        for piece in parameter.pieces:
            wanted.setdefault(piece.name, []).append((piece, tensor))
    shapes = {name: shape for name, shape in full_names(config).items() if name in wanted}
    for name, source in open_tensors(directory, shapes):
        for piece, tensor in wanted[name]:
            own = slice(piece.start, piece.stop)
            with torch.no_grad():
                piece.of_local(tensor).copy_(source[own] if piece.dim == 0 else source[:, own])


def fill_full(flat: Tensor, views: Mapping[str, Tensor], held: Held, layout: TrainLayout) -> None:
    """Fill the views, places in the zeroed bytes `flat`, on every rank; collective over the trainer."""
    alone = layout.tp * layout.pp * layout.ep * layout.etp == 1  # every rank has it all
    with torch.no_grad():
        for parameter, tensor in held:
            if not (alone or parameter.owned):
                continue
            for piece in parameter.pieces:
                if piece.name in views:
                    piece.of_full(views[piece.name]).copy_(piece.of_local(tensor))
    if not alone:
        dist.all_reduce(flat)
