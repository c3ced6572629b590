"""Megatron-core on the batch-invariant kernels: layer specs, built models, and the two functions that no spec names.

    spec = layer_spec(get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True))
    model = GPTModel(config, spec, ...)
    take_over(model)                  # word embedding, output layer, final norm
    with enable():                    # rotary embedding, and products that no layer names
        loss = ...; loss.backward()

With `log_prob(..., group=...)` on the vocabulary-parallel logits that is the whole forward and backward of a policy.
megatron-core is imported by these functions alone; without it they raise `MegatronMissing`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from .enable import enable_aten
from .megatron_rotary import Rotary
from .rms_norm_module import RmsNorm

KEPT = ("TransformerLayer", "SelfAttention", "IdentityOp", "IdentityFuncOp")
REPLACED = (
    "ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding", "Mlp", "GroupedExperts", "SharedExperts",
    "TopKRouter", "MoELayer",
)  # fmt: skip
KEPT_FUNCTIONS = ("get_bias_dropout_add", "_build_shared_experts")


class MegatronMissing(ImportError):  # noqa: N818  # named by what is wrong, as Python's own ModuleNotFoundError
    """megatron-core is not installed, or lacks a class that these hooks replace."""


def _layers() -> ModuleType:
    try:
        from . import megatron_layers
    except ImportError as error:
        raise MegatronMissing(f"megatron-core 0.19 is needed for its layers to run on these kernels: {error}") from error
    return megatron_layers


@functools.cache
def _classes() -> dict[type, type]:
    """Megatron's class -> ours."""
    ours = _layers()
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    pairs: dict[type, type] = {WrappedTorchNorm: RmsNorm, DotProductAttention: ours.CoreAttention}
    for name in REPLACED:
        mine: type = getattr(ours, name)
        pairs[mine.__mro__[1]] = mine
    return pairs


def layer_spec(spec: Any) -> Any:
    """A copy of a Megatron-core spec whose layers are this package's.

    spec: what `get_gpt_layer_local_spec` returns, or `get_gpt_decoder_block_spec(..., use_transformer_engine=False)`: a
    ModuleSpec, the submodules in it, or functools.partial objects over either. Raises ValueError naming a slot that holds
    something else, such as a Transformer Engine layer; MegatronMissing without megatron-core.
    """
    return _replaced(spec, "spec")


def _replaced(node: Any, place: str) -> Any:
    if isinstance(node, type):
        return _replaced_class(node, place)
    if isinstance(node, functools.partial):
        function = _replaced(node.func, place)
        keywords = {name: _replaced(value, f"{place}.{name}") for name, value in node.keywords.items()}
        return functools.partial(function, *node.args, **keywords)
    if isinstance(getattr(node, "__self__", None), type):  # MLP.as_mlp_submodule, bound to its class
        return getattr(_replaced_class(node.__self__, place), node.__name__)
    if isinstance(node, list):
        return [_replaced(each, f"{place}[{i}]") for i, each in enumerate(node)]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        found = copy.copy(node)
        for field in dataclasses.fields(node):
            if field.name not in ("params", "metainfo", "sharded_state_dict_keys_map"):
                setattr(found, field.name, _replaced(getattr(node, field.name), f"{place}.{field.name}"))
        return found
    if node is None or getattr(node, "__name__", None) in KEPT_FUNCTIONS:
        return node
    raise ValueError(f"{place} is {node!r}; allowed: the layers of Megatron-core's local specs")


def _replaced_class(node: type, place: str) -> type:
    pairs = _classes()
    if node in pairs:
        return pairs[node]
    if node.__name__ in KEPT or node in pairs.values():
        return node
    allowed = sorted({known.__name__ for known in pairs} | set(KEPT))
    raise ValueError(f"{place} is {node.__name__}; allowed: {', '.join(allowed)}")


def take_over(model: torch.nn.Module) -> int:
    """Give a built model's remaining layers (word embedding, output layer, final norm) this package's forward; returns how many.

    model: a GPTModel, or a list's element, with or without Float16Module or DistributedDataParallel around it. Layers keep
    their parameters. Raises ValueError for a config that these layers do not cover; MegatronMissing without megatron-core.
    """
    pairs: dict[type, type] = {**_classes(), torch.nn.RMSNorm: RmsNorm}
    taken = 0
    for module in model.modules():
        mine = pairs.get(type(module))
        if mine is not None and issubclass(mine, type(module)):
            module.__class__ = mine  # a subclass without state of its own
            taken += 1
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            _layers().check_config(config)
            break
    return taken


@contextlib.contextmanager
def enable() -> Iterator[None]:
    """While the context lasts, Megatron-core's rotary embedding is `rope`, and aten's products are `matmul` (`enable_aten`).

    Raises MegatronMissing without megatron-core.
    """
    _layers()
    from megatron.core.transformer import attention

    theirs = attention.apply_rotary_pos_emb
    attention.apply_rotary_pos_emb = Rotary()
    try:
        with enable_aten():
            yield
    finally:
        attention.apply_rotary_pos_emb = theirs
