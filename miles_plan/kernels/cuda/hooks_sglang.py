"""SGLang on the batch-invariant kernels: its layers, its attention backend, its sampler.

Three ways in, for a server that SGLang starts by itself or for one that the caller starts:

- SGLang loads the plugin `miles_plan` (an entry point of this package) in each of its processes; it does nothing unless the
  environment has MILES_PLAN_SGLANG_KERNELS=1, and then registers the backend and sampler named "miles_plan" and takes over
  each model that is loaded.
- `plugin()` called by hand in the process that loads the model, before it does, is the same without the entry point.
- `install(model)` takes over a loaded model's layers, and nothing else.

Start the server with `attention_backend="miles_plan"`, `enable_deterministic_inference=True` (which turns SGLang's fused
query-key norm and fused all-reduce off), page size 64 or 128, no quantisation and no data-parallel attention. A layer that is not covered raises ValueError when the model is loaded. sglang is imported by these functions alone;
without it they raise `SglangMissing`.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .enable import enable_aten
from .expert_rows import expert_order, expert_rows
from .experts import swiglu_experts
from .matmul import matmul, tree_all_reduce, tree_partial
from .moe_combine import moe_combine
from .rms_norm import rms_norm
from .rope import rope
from .rope_table import angles_of, inverse_frequencies, rotation_tables, scaled_frequencies
from .router import router
from .swiglu import swiglu

NAME = "miles_plan"
SWITCH = "MILES_PLAN_SGLANG_KERNELS"
SUM_TO = "_miles_plan_sum_to"  # on a float32 partial: the dtype that the sum over ranks is rounded to


class SglangMissing(ImportError):  # noqa: N818  # named by what is wrong, as Python's own ModuleNotFoundError
    """sglang is not installed, or lacks a class that these hooks replace."""


@dataclass(frozen=True, slots=True)
class LayerTypes:
    """SGLang's classes that are taken over."""

    linear: type[Any]
    row_linear: type[Any]
    norm: type[Any]
    activation: type[Any]
    rotary: type[Any]
    experts: type[Any]
    choice: type[Any]
    plain_linear_method: type[Any]
    plain_experts_method: type[Any]
    combine_input: Callable[..., Any]


def layer_types() -> LayerTypes:
    """From the installed sglang. Raises SglangMissing."""
    try:
        from sglang.srt.layers.activation import SiluAndMul
        from sglang.srt.layers.layernorm import RMSNorm
        from sglang.srt.layers.linear import LinearBase, RowParallelLinear
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
        from sglang.srt.layers.moe.topk import TopK
        from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod
        from sglang.srt.layers.rotary_embedding import RotaryEmbedding
    except ImportError as error:
        raise SglangMissing(f"sglang 0.5.16 is needed for its layers to run on these kernels: {error}") from error
    return LayerTypes(
        LinearBase, RowParallelLinear, RMSNorm, SiluAndMul, RotaryEmbedding, FusedMoE, TopK, UnquantizedLinearMethod,
        UnquantizedFusedMoEMethod, StandardCombineInput,
    )  # fmt: skip


def plugin() -> None:
    """What SGLang calls in each of its processes; does nothing unless MILES_PLAN_SGLANG_KERNELS is 1."""
    if os.environ.get(SWITCH) != "1":
        return
    register()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # The step after loading, where SGLang's deterministic mode would put kernels of its own under aten.
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode", _take_over, HookType.REPLACE
    )


def _take_over(runner: Any) -> None:
    parameters = getattr(runner.model_config.hf_config, "rope_parameters", None) or {}
    install(runner.model, rope_parameters=parameters)


def register() -> None:
    """Register the attention backend and the sampler named "miles_plan", and add partial sums over ranks as a tree.

    The sampler also takes the name "pytorch", which SGLang's deterministic mode sets whatever was asked for.
    Raises SglangMissing.
    """
    try:
        from sglang.srt import server_args
        from sglang.srt.distributed.parallel_state import GroupCoordinator
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.layers.sampler import register_sampler_backend

        from .sglang_backends import PagedAttention, SeededSampler
    except ImportError as error:
        raise SglangMissing(f"sglang 0.5.16 is needed for its backends to run on these kernels: {error}") from error
    server_args.add_attention_backend_choices([NAME])
    server_args.add_deterministic_attention_backend_choices([NAME])
    server_args.add_radix_supported_deterministic_attention_backend_choices([NAME])
    register_attention_backend(NAME)(PagedAttention)
    for name in (NAME, "pytorch"):
        register_sampler_backend(name, SeededSampler)
    if not hasattr(GroupCoordinator.all_reduce, "__wrapped__"):
        GroupCoordinator.all_reduce = tree_first(GroupCoordinator.all_reduce)


def tree_first(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A GroupCoordinator.all_reduce that adds what `install`'s row-parallel layers leave as a tree, and the rest as before."""

    def all_reduce(group: Any, input_: torch.Tensor) -> Any:
        dtype = getattr(input_, SUM_TO, None)
        return theirs(group, input_) if dtype is None else tree_all_reduce(input_, dtype, group.device_group)

    all_reduce.__wrapped__ = theirs  # type: ignore[attr-defined]  # functools.wraps' own mark
    return all_reduce


def install(
    model: torch.nn.Module, types: LayerTypes | None = None, rope_parameters: Mapping[str, Any] | None = None
) -> Counter[str]:
    """Take over the layers of a loaded SGLang model; returns how many of each kind.

    types: SGLang's classes, by default the installed package's. rope_parameters: transformers' field of that name, by
    which scaled rotary embeddings get the trainers' tables; without it, or scaled otherwise than linear or llama3, they keep
    SGLang's, whose last bits a trainer need not share. Also replaces aten's products and log-softmax in this process
    while the model lives (`enable.enable_aten`), which is how the output head, a bare product in SGLang, is reached.
    Raises ValueError naming a layer that is quantised, biased or of an unknown kind; SglangMissing without sglang.
    """
    types = layer_types() if types is None else types
    taken: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, types.linear):
            _take_linear(name, module, types)
            taken["linear"] += 1
        elif isinstance(module, types.norm):
            _take_norm(name, module)
            taken["norm"] += 1
        elif isinstance(module, types.activation):
            module._forward_method = swiglu
            taken["activation"] += 1
        elif isinstance(module, types.rotary):
            module._forward_method = _Rotary(name, module, rope_parameters or {}, plain=type(module) is types.rotary)
            taken["rotary"] += 1
        elif isinstance(module, types.experts):
            _take_experts(name, module, types)
            taken["experts"] += 1
        elif isinstance(module, types.choice):
            _take_choice(name, module)
            taken["choice"] += 1
    products = contextlib.ExitStack()
    products.enter_context(enable_aten(next(model.parameters()).device.type))
    model.__dict__["batch_invariant_products"] = products  # in force as long as the model
    return taken


def _with_apply(method: Any, apply: Callable[..., Any]) -> Any:
    """A copy of a quantisation method whose `apply` is ours; what loads and reloads weights stays."""
    mine = copy.copy(method)
    mine.apply = apply
    return mine


def _take_linear(name: str, module: Any, types: LayerTypes) -> None:
    if type(module.quant_method) is not types.plain_linear_method:
        raise ValueError(f"{name} has the quantisation {type(module.quant_method).__name__}; allowed: none")
    if getattr(module, "bias", None) is not None:
        raise ValueError(f"{name} has a bias; allowed: none")
    if isinstance(module, types.row_linear):
        apply: Callable[..., torch.Tensor] = partial(_row_linear, ranks=int(module.tp_size))
    elif name.rsplit(".", 1)[-1] == "gate":  # the router's product, which `router` takes unrounded
        apply = _gate
    else:
        apply = _column_linear
    module.quant_method = _with_apply(module.quant_method, apply)


def _column_linear(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return matmul(x, layer.weight)


def _gate(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return matmul(x, layer.weight, out_dtype=torch.float32)


def _row_linear(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, *, ranks: int) -> torch.Tensor:
    """The whole product, or this rank's subtree marked for `tree_first`; an unmarked sum would not fit the residual's dtype."""
    if ranks == 1:
        return matmul(x, layer.weight, order="tree")
    part = tree_partial(x, layer.weight, ranks)
    setattr(part, SUM_TO, x.dtype)
    return part


def _take_norm(name: str, module: Any) -> None:
    odd = ("variance_size_override", "fp32_residual", "override_orig_dtype")
    if any(getattr(module, each, None) for each in odd) or not module.has_weight:
        raise ValueError(f"{name} has {' or '.join(odd)} set or no weight; allowed: a plain RMSNorm")
    module._forward_method = partial(_norm, module)


def _norm(
    module: Any, x: torch.Tensor, residual: torch.Tensor | None = None, post_residual_addition: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if residual is not None and post_residual_addition is not None:
        residual = residual + post_residual_addition
    return rms_norm(x, module.weight.data, module.variance_epsilon, residual)


class _Rotary:
    """The forward of a rotary embedding; with the trainers' frequencies at hand also their tables, else SGLang's own."""

    def __init__(self, name: str, module: Any, rope_parameters: Mapping[str, Any], *, plain: bool) -> None:
        if not module.is_neox_style:
            raise ValueError(f"{name} interleaves its halves; allowed: the half rotation (is_neox_style)")
        self.head_size, self.size = int(module.head_size), int(module.rotary_dim)
        cache = module.cos_sin_cache
        inverse = inverse_frequencies(module.base, self.size)
        scaled = inverse if plain else scaled_frequencies(inverse, rope_parameters)
        if scaled is not None:
            self.cos, self.sin = rotation_tables(angles_of(scaled.to(cache.device), cache.shape[0]))
        else:
            self.cos, self.sin = (half.float().contiguous() for half in cache.chunk(2, -1))

    def __call__(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, offsets: torch.Tensor | None = None,
        fused_set_kv_buffer_arg: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Rotated query and key in their own shapes; also into the cache where SGLang asks that of the fused kernel."""
        at = (positions if offsets is None else positions + offsets).flatten()
        q, k = (x.view(at.numel(), -1, self.head_size) for x in (query, key))
        if self.size == self.head_size:
            turned = rope(q, k, self.cos, self.sin, at)
        else:
            first = rope(q[..., : self.size], k[..., : self.size], self.cos, self.sin, at)
            turned = torch.cat((first[0], q[..., self.size :]), -1), torch.cat((first[1], k[..., self.size :]), -1)
        out_q, out_k = turned[0].view(query.shape), turned[1].view(key.shape)
        into = fused_set_kv_buffer_arg
        if into is not None:
            into.k_buffer[into.cache_loc] = out_k.reshape(at.numel(), -1)
            into.v_buffer[into.cache_loc] = into.value.reshape(at.numel(), -1)
        return out_q, out_k


def _take_choice(name: str, module: Any) -> None:
    config = module.topk_config
    if (
        config.num_fused_shared_experts
        or config.custom_routing_function is not None
        or config.routed_scaling_factor not in (None, 1.0)
    ):
        raise ValueError(f"{name} fuses shared experts, scales or routes in its own way; allowed: none of them")
    options: dict[str, Any] = {
        "scoring": config.scoring_func, "renormalize": config.renormalize,
        "bias": None if config.correction_bias is None else config.correction_bias.float(),
    }  # fmt: skip
    if config.use_grouped_topk:
        options |= {"groups": config.num_expert_group, "groups_kept": config.topk_group}

    def choose(
        hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return router(gating_output.float().contiguous(), topk, **options)

    # SGLang records routed experts after this function, whichever it is
    config.custom_routing_function = choose
    config.use_grouped_topk = False


def _take_experts(name: str, module: Any, types: LayerTypes) -> None:
    if type(module.quant_method) is not types.plain_experts_method:
        raise ValueError(f"{name} has the quantisation {type(module.quant_method).__name__}; allowed: none")
    if module.moe_tp_size > 1:
        raise ValueError(f"{name} splits each expert over {module.moe_tp_size} ranks; allowed: expert parallelism of all ranks")
    module.quant_method = _with_apply(module.quant_method, partial(_experts, combine_input=types.combine_input))


def _experts(layer: Any, dispatch_output: Any, *, combine_input: Callable[..., Any]) -> Any:
    """Experts' rows added per token in ascending expert number, as `megatron_layers.MoELayer` adds them.

    With expert parallelism each rank fills the rows of its experts; a sum over ranks then has one nonzero term a row. The
    combined result stays on rank 0 and zeros on the others, because SGLang adds the ranks' results once more.
    """
    x, chosen = dispatch_output.hidden_states, dispatch_output.topk_output
    ids, by_number = torch.sort(chosen.topk_ids.long(), dim=1)
    weights = chosen.topk_weights.float().gather(1, by_number).contiguous()
    local, ranks, rank = int(layer.num_local_experts), int(layer.moe_ep_size), int(layer.moe_ep_rank)
    # the rank's own experts first, so that their rows begin at 0 on every rank and nothing waits for the counts
    order = expert_order((ids - rank * local) % (local * ranks), local * ranks)
    out = _local_experts(layer, expert_rows(x, order), order.counts[:local].contiguous())
    if ranks > 1:
        # ranks order rows differently: back to (token, slot), where each row is one rank's and zeros elsewhere
        out = out.index_select(0, order.place.flatten().long())
        torch.distributed.all_reduce(out, group=_expert_group())
    combined = moe_combine(out, _slots(ids) if ranks > 1 else order.place, weights)
    return combine_input(hidden_states=combined if rank == 0 else torch.zeros_like(combined))


def _slots(ids: torch.Tensor) -> torch.Tensor:
    """Rows in (token, slot) order."""
    return torch.arange(ids.numel(), device=ids.device, dtype=torch.int32).view(ids.shape)


def _local_experts(layer: Any, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The rows of this rank's experts, which come first, through them; zeros for the others'."""
    mine = counts.sum()
    here = rows[: int(mine)] if rows.device.type == "cpu" else rows
    out = swiglu_experts(here, layer.w13_weight, layer.w2_weight, counts)
    if rows.device.type == "cpu":
        return torch.cat((out, out.new_zeros(rows.shape[0] - out.shape[0], out.shape[1])))
    there = torch.arange(rows.shape[0], device=rows.device) < mine
    return torch.where(there[:, None], out, torch.zeros((), device=out.device, dtype=out.dtype))


def _expert_group() -> Any:
    from sglang.srt.distributed import get_moe_ep_group

    return get_moe_ep_group().device_group
