"""From derived arguments to Megatron modules on this rank: process groups, configuration, one module a model chunk."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from miles_plan.backends.engine import EngineError
from miles_plan.backends.megatron_engine.arguments import MegatronArguments
from miles_plan.backends.megatron_engine.options import MegatronEngineOptions
from miles_plan.backends.training.agreement import open_process_group
from miles_plan.backends.training.decoder_config import DecoderConfig


def open_groups(options: MegatronEngineOptions, arguments: MegatronArguments, rank: int, rendezvous: str | None) -> None:
    """Start torch.distributed where it has not been, and Megatron's process groups. Collective over the trainer."""
    from megatron.core import parallel_state

    layout = options.layout
    open_process_group(layout.world_size, rank, rendezvous, device=options.device)
    if parallel_state.model_parallel_is_initialized():
        return  # a trainer was here before with this process
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=arguments.parallel.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    if options.device == "cuda":
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(options.seed)


def transformer_config(arguments: MegatronArguments) -> Any:
    """Megatron's TransformerConfig. EngineError with Megatron's own words when it refuses the combination."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    model, precision = asdict(arguments.model), asdict(arguments.precision)
    parallel, moe = asdict(arguments.parallel), asdict(arguments.moe) if arguments.moe is not None else {}
    for name in ("padded_vocab_size", "max_sequence_length", "share_embeddings_and_output_weights"):
        del model[name]  # of the model, not of its layers
    model["activation_func"] = torch.nn.functional.silu
    dtype = getattr(torch, precision["params_dtype"])
    precision |= {"params_dtype": dtype, "recompute_modules": list(precision["recompute_modules"]) or None}
    precision["gradient_accumulation_fusion"] = False  # turned on module by module: see fuse_gradient_accumulation
    stages = [list(stage) for stage in parallel.pop("pipeline_layout")]
    if stages:
        parallel["pipeline_model_parallel_layout"] = stages
        del parallel["virtual_pipeline_model_parallel_size"]  # it follows from the layout
    if moe:
        moe["moe_layer_freq"] = list(moe["moe_layer_freq"])
    else:
        moe["moe_token_dispatcher_type"] = "alltoall"  # Megatron's default refuses variable lengths even without experts
    on_cpu = precision.pop("device") == "cpu"
    del precision["layer_spec"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return TransformerConfig(
                **model,
                **precision,
                **parallel,
                **moe,
                pipeline_dtype=dtype,
                perform_initialization=False,
                use_cpu_initialization=on_cpu,
                bias_dropout_fusion=False,  # without bias and dropout there is an addition to fuse, recompiled for every length
                masked_softmax_fusion=False,
            )
    except (AssertionError, ValueError) as error:
        raise EngineError(f"megatron train engine: Megatron refuses these arguments: {error}\n{arguments.to_text()}") from error


def build_chunks(config: DecoderConfig, arguments: MegatronArguments, transformer: Any) -> list[torch.nn.Module]:
    """This rank's model chunks, weights unset. Collective over the trainer's groups."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # deprecations of this very class
    layers, device = arguments.precision.layer_spec, arguments.precision.device
    virtual = arguments.parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for number in range(virtual or 1):
        stage = number if virtual else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        spec = get_gpt_decoder_block_spec(
            transformer, use_transformer_engine=layers == "transformer_engine", normalization="RMSNorm", vp_stage=stage
        )
        if layers == "local":
            _take_packed_sequences(spec)
        elif layers == "batch_invariant":
            spec = _hooks().layer_spec(spec)
        model = GPTModel(
            transformer,
            spec,
            vocab_size=arguments.model.padded_vocab_size,
            max_sequence_length=arguments.model.max_sequence_length,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=arguments.model.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            vp_stage=stage,
        )
        frequencies = torch.tensor(config.inverse_frequencies, dtype=torch.float32, device=device)
        model.rotary_pos_emb.inv_freq = frequencies
        if last:
            _score_selected_rows(model.output_layer, arguments.parallel.tensor_model_parallel_size)
        model.to(device=device, dtype=transformer.params_dtype)
        model.rotary_pos_emb.inv_freq = frequencies  # stays float32
        if layers == "batch_invariant":
            _hooks().take_over(model)
        chunks.append(model)
    return chunks


def routers_of(chunks: list[torch.nn.Module], config: DecoderConfig) -> Iterator[tuple[int, int, Any]]:
    """Every router of this rank: its chunk, its column in a routing record, the module."""
    for number, chunk in enumerate(chunks):
        for layer in unwrapped(chunk).decoder.layers:
            if hasattr(layer.mlp, "router"):
                yield number, config.moe_layers.index(layer.layer_number - 1), layer.mlp.router


def unwrapped(chunk: torch.nn.Module) -> Any:
    """The GPTModel itself."""
    return getattr(chunk, "module", chunk)


def fuse_gradient_accumulation(chunk: torch.nn.Module) -> None:
    """Transformer Engine's layers add their weight gradients straight into the float32 buffers. Megatron's own output layer
    could only with Apex, and its flag cannot be set without it, so the flag is set where it can be obeyed."""
    layers: Iterator[Any] = chunk.modules()
    for module in layers:
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def parameters_by_name(chunks: list[torch.nn.Module]) -> dict[tuple[int, str], Tensor]:
    """(chunk, name in GPTModel) -> parameter."""
    bare = [unwrapped(chunk) for chunk in chunks]
    return {(number, name): tensor for number, chunk in enumerate(bare) for name, tensor in chunk.named_parameters()}


def invariant_arithmetic(layers: str) -> AbstractContextManager[Any]:
    """What forward and backward run inside of: our kernels in place of torch's matmuls where the layers are batch invariant."""
    return _hooks().enable() if layers == "batch_invariant" else nullcontext()


def _hooks() -> Any:
    try:
        return importlib.import_module("miles_plan.kernels.cuda.hooks_megatron")
    except ImportError as error:
        raise EngineError(f"megatron train engine: layer_spec='batch_invariant' cannot be had here: {error}") from error


def _take_packed_sequences(spec: Any) -> None:
    from miles_plan.backends.megatron_engine.local_attention import PackedTorchAttention

    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = PackedTorchAttention


def _score_selected_rows(output_layer: Any, tp: int) -> None:
    """The rows that predict a response are picked before the logits, which sequence parallelism would scatter otherwise."""
    output_layer.sequence_parallel = False
    output_layer.allreduce_dgrad = tp > 1
