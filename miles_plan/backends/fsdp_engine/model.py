"""The transformers implementation of a model, its parameters sharded over ranks by torch's fully_shard."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miles_plan.backends.fsdp_engine.checkpoint_names import StoredPart, stored_parts
from miles_plan.backends.training.checkpoint_reader import open_tensors, stored_shapes
from miles_plan.backends.training.packed_attention import packed_causal_attention
from miles_plan.ir.layout import Recompute

PACKED = "miles_plan_packed"  # the name that transformers knows our attention by


@dataclass(frozen=True, slots=True, eq=False)
class PackedBounds:
    """Where packed sequences begin, and where the last one ends: on the host, and as int32 on the device."""

    rows: tuple[int, ...]
    offsets: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ShardedModel:
    """module: the transformers model under fully_shard; parts: what each parameter is made of; routers: by layer, in order.

    vocab_size, max_positions, moe_layers, num_experts, experts_per_token: what a batch must fit.
    """

    module: Any
    parts: dict[str, tuple[StoredPart, ...]]
    routers: tuple[Any, ...]
    vocab_size: int
    max_positions: int
    moe_layers: tuple[int, ...]
    num_experts: int
    experts_per_token: int

    @property
    def parameters(self) -> dict[str, Any]:
        """Name -> DTensor, tied ones once."""
        return dict(self.module.named_parameters())


def build(directory: Path, *, dtype: torch.dtype, device: str, recompute: Recompute, trained: bool = True) -> ShardedModel:
    """Build and load; collective over all ranks of torch.distributed. A model that is not trained is held in `dtype`.

    ValueError for a model transformers does not know or a checkpoint that does not match it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    held = torch.float32 if trained else dtype
    auto: Any = AutoModelForCausalLM  # its methods carry no annotations
    with _parameters_on_meta():
        module = auto.from_config(config, dtype=held, attn_implementation=_attention_of(config))
    module.train(trained).requires_grad_(trained)
    layers = _layers(module)
    for layer in layers:
        _recompute(layer, recompute if trained else "none")
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for each in (*layers, module):
        _materialise(each, device)  # one layer at a time is whole on the device
        if each is module:
            module.tie_weights()
        fully_shard(each, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        each.set_gradient_divide_factor(1.0)  # losses are normalised over the whole batch: gradients are summed
        each.set_force_sum_reduction_for_comms(True)  # and by a plain sum: gloo has no scaled one
    stored = stored_shapes(directory)
    parts = {name: tuple(stored_parts(name, tensor.shape, stored)) for name, tensor in module.named_parameters()}
    _load(directory, module, parts)
    found = {index: router for index, layer in enumerate(layers) if (router := _router(layer)) is not None}
    return ShardedModel(
        module,
        parts,
        tuple(found.values()),
        vocab_size=int(config.vocab_size),
        max_positions=int(config.max_position_embeddings),
        moe_layers=tuple(found),
        num_experts=int(getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0),
        experts_per_token=int(getattr(config, "num_experts_per_tok", None) or 0),
    )


def local(parameter: Any) -> Tensor:
    """This rank's share of a parameter."""
    tensor: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return tensor.detach()


def first_row(parameter: Any) -> int:
    """The row of the whole parameter that this rank's share begins with."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    compute: Any = compute_local_shape_and_global_offset
    _, offsets = compute(parameter.shape, parameter.device_mesh, parameter.placements)
    return int(offsets[0])


def _attention_of(config: Any) -> str:
    """Ours for causal attention over whole sequences or a window; transformers' masks for anything else.

    A model that transformers lets no fused attention compute (capped scores, sinks) takes its plain one.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    mapping: Any = AutoModelForCausalLM._model_mapping
    if type(config) in mapping and not mapping[type(config)]._supports_sdpa:
        return "eager"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return "sdpa"
    AttentionInterface.register(PACKED, _packed_attention)  # without a mask of the same name transformers makes none
    return PACKED


def _packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    bounds: PackedBounds,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, t, d] in, [1, t, heads, d] out; bounds come through the model's call."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = packed_causal_attention(q, k, v, bounds.rows, scale=scaling, window=sliding_window, offsets=bounds.offsets)
    return out[None], None


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside have no memory; buffers are real, since nothing would fill them later."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    patched: Any = torch.nn.Module
    patched.register_parameter = on_meta
    try:
        yield
    finally:
        patched.register_parameter = register


def _layers(module: Any) -> list[Any]:
    """The decoder's layers: the units of sharding."""
    return list(module.get_decoder().layers)


def _recompute(layer: Any, what: Recompute) -> None:
    targets = {"none": [], "selective": [layer.self_attn], "full": [layer]}[what]
    for each in targets:
        each.forward = functools.partial(checkpoint, each.forward, use_reentrant=False)


def _materialise(module: Any, device: str) -> None:
    """Memory for the parameters that have none, to be loaded later; buffers move with their values."""
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                setattr(each, name, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in each.named_buffers(recurse=False):
            setattr(each, name, buffer.to(device))


def _load(directory: Path, module: Any, parts: dict[str, tuple[StoredPart, ...]]) -> None:
    """Read this rank's rows of every parameter."""
    parameters = dict(module.named_parameters())
    places = {part.name: (name, part) for name, found in parts.items() for part in found}
    shapes = {name: part.shape for name, (_, part) in places.items()}
    with torch.no_grad():
        for name, source in open_tensors(directory, shapes):
            owner, part = places[name]
            shard, first = local(parameters[owner]), first_row(parameters[owner])
            if part.expert is None:
                shard.copy_(source[first : first + len(shard)])
            elif first <= part.expert < first + len(shard):
                part.of(shard, first).copy_(source[:])


def _router(layer: Any) -> Any:
    """A layer's router of experts, None for a dense layer."""
    gate = getattr(getattr(layer, "mlp", None), "gate", None)
    return gate if hasattr(gate, "top_k") and hasattr(gate, "weight") else None
