"""Maps a shipped launch configuration of Miles or slime to its layouts and says whether trainer and engines fit."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, cast

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.gpus import Gpu, find_gpu
from miles_plan.cost.rollout_memory import RolloutMemoryOptions, rollout_memory
from miles_plan.cost.train_memory import MemoryBreakdown, train_memory
from miles_plan.cost.train_options import OptimizerOptions, TrainMemoryOptions, TrainPrecision
from miles_plan.cost.validation.memory_rows import ADAPTER_SHARE, expandable_segments
from miles_plan.cost.validation.row_fields import (
    IncompleteRowError,
    Row,
    UnmappedRowError,
    figure_of,
    row_gpu,
    row_model,
    row_precision,
    size_of,
)
from miles_plan.ir.layout import Recompute, RolloutLayout, TrainLayout

DEFAULT_TOKENS_PER_GPU = 8192
"""One microbatch where a launcher states none: its longest response with the prompt is cut to about that."""
FSDP_TOKENS_PER_GPU = 8192


@dataclass(frozen=True, slots=True)
class LaunchCheck:
    """What the estimate says of one launch configuration.

    gpu_stated: whether the configuration or its documentation names the GPU; fits: trainer and engines fit it;
    defect: what is wrong with the layout, or what does not fit; shares: used over usable memory of each side.
    """

    gpu: Gpu
    gpu_stated: bool
    fits: bool
    defect: str
    shares: dict[str, float]


def is_launch_row(row: Row) -> bool:
    """Whether a row is a launch configuration and not a measurement."""
    return "raw_args" in row and "metric" not in row


def check_launch(row: Row) -> LaunchCheck:
    """Check one configuration.

    Raises:
        UnmappedRowError: model, layout or GPU count are not stated.
    """
    model = row_model(row)
    if row.get("kind") == "doc_table" and not row.get("total_gpus_basis"):
        raise IncompleteRowError("total_gpus is not stated")
    if "documentation table" in str(row.get("total_gpus_basis")) and size_of(row, "total_gpus", 0) > 4096:
        raise IncompleteRowError("total_gpus is not stated")  # the table's column is tokens a GPU
    gpu, stated = _gpu(row)
    layout = _train_layout(row, model)
    if defect := _layout_defect(model, layout):
        return LaunchCheck(gpu, stated, False, defect, {})
    try:
        held = train_memory(model, layout, _memory_options(row, layout))
    except ValueError as error:
        return LaunchCheck(gpu, stated, False, str(error), {})
    shares = {"trainer": held.needed_bytes(expandable_segments(row)) / gpu.usable_bytes}
    rollout = _rollout_layout(row)
    if rollout is not None:
        shares["engine"] = _engine_share(row, model, rollout, gpu)
    over = [name for name, share in shares.items() if share > 1.0]
    defect = ", ".join(f"the {name} needs {shares[name]:.2f} times the GPU's memory" for name in over)
    if "trainer" in over:
        defect += f" ({_too_few_gpus(model, layout, held, gpu)})"
    return LaunchCheck(gpu, stated, not over, defect, shares)


def _too_few_gpus(model: ModelArchitecture, layout: TrainLayout, held: MemoryBreakdown, gpu: Gpu) -> str:
    """Why a trainer does not fit: what its fullest GPU keeps between steps, and the GPUs that an even share would fill."""
    between = f"{held.static_bytes / (1 << 30):,.0f} GiB of state a GPU between steps"
    weights = next((term.value for term in held.terms if term.name == "parameters"), 0.0)
    fewest = math.ceil(2.0 * model.params_total * held.static_bytes / max(weights, 1.0) / gpu.usable_bytes)
    if fewest <= layout.world_size:
        return between
    return f"{between}: the state alone fills {fewest} GPUs of this kind, the layout has {layout.world_size}"


_DOCUMENTED_GPU = re.compile(r"\b(?:H100|H200|B200|B300|GB200|GB300|MI300X|MI325X?|MI350X|MI355X)\b")


def _gpu(row: Row) -> tuple[Gpu, bool]:
    """The GPU a configuration names; where it names none, an H200, and not counted as stated."""
    if row.get("hardware"):
        try:
            return row_gpu(row), True
        except UnmappedRowError:
            if row["hardware"] != "AMD":
                raise
            return find_gpu("mi300x"), False
    named = {name for text in row.get("hardware_docs") or () for name in _DOCUMENTED_GPU.findall(str(text))}
    if len(named) == 1:
        return row_gpu({"hardware": named.pop()}), False
    return find_gpu("h200"), False


def _trainer_gpus(row: Row) -> int:
    nodes, each = size_of(row, "actor_num_nodes", 0), size_of(row, "actor_gpus_per_node", 0)
    if nodes and each:
        return nodes * each
    total = size_of(row, "total_gpus", 0)
    if not total:
        raise IncompleteRowError("total_gpus is not stated")
    return total if row.get("colocate", True) else total - size_of(row, "rollout_num_gpus", 0)


def _train_layout(row: Row, model: ModelArchitecture) -> TrainLayout:
    gpus = _trainer_gpus(row)
    tp, pp, cp, ep, etp, vpp = (size_of(row, name) for name in ("tp", "pp", "cp", "ep", "etp", "vpp"))
    if gpus % (tp * pp * cp):
        raise IncompleteRowError(f"tp x pp x cp = {tp * pp * cp} does not divide {gpus} GPUs")
    return TrainLayout(
        tp=tp,
        pp=pp,
        cp=cp,
        vpp=vpp,
        dp=gpus // (tp * pp * cp),
        ep=ep if model.moe else 1,
        etp=etp if model.moe else 1,
        sequence_parallel=tp > 1,
        stage_layers=_stage_layers(row, model, pp * vpp),
    )


def _stage_layers(row: Row, model: ModelArchitecture, chunks: int) -> tuple[int, ...]:
    """Layers of each stage where the first or the last is stated, the others sharing the rest evenly."""
    first = size_of(row, "decoder_first_pipeline_num_layers", 0)
    last = size_of(row, "decoder_last_pipeline_num_layers", 0)
    if not first and not last:
        return ()
    middle = chunks - bool(first) - bool(last)
    rest = model.num_layers - first - last
    if middle <= 0 or rest % middle:
        raise IncompleteRowError(f"{rest} layers do not divide over the {middle} other stages")
    head, tail = ((first,) if first else ()), ((last,) if last else ())
    return head + (rest // middle,) * middle + tail


def _layout_defect(model: ModelArchitecture, layout: TrainLayout) -> str:
    if problem := next(layout.problems(), None):
        return problem
    if model.moe and model.moe.experts % layout.ep:
        return f"ep={layout.ep} does not divide {model.moe.experts} experts"
    heads = max((getattr(kind.mixer, "heads", 0) for kind in model.kinds if kind.mixer), default=0)
    if heads and heads % layout.tp:
        return f"tp={layout.tp} does not divide {heads} attention heads"
    return ""


def _memory_options(row: Row, layout: TrainLayout) -> TrainMemoryOptions:
    recompute = cast("dict[str, Any]", row.get("recompute") or {})
    mode = str(recompute.get("granularity") or "none")
    fsdp = row.get("train_backend") == "fsdp"
    if "fsdp" in mode:
        mode = "full"
    tokens = size_of(row, "max_tokens_per_gpu", 0) or (FSDP_TOKENS_PER_GPU if fsdp else DEFAULT_TOKENS_PER_GPU)
    offloaded = bool(row.get("optimizer_cpu_offload"))
    return TrainMemoryOptions(
        engine="fsdp2" if fsdp else "megatron",
        tokens_per_gpu=tokens,
        seq_len=max(tokens, size_of(row, "rollout_max_response_len", tokens)),
        num_microbatches=2 * layout.pp,
        precision=cast(TrainPrecision, row_precision({"precision": row.get("train_precision")})),
        grad_bytes=4.0 if row.get("grad_dtype_fp32_accumulate", True) or fsdp else 2.0,
        recompute=cast(Recompute, mode if mode in ("full", "selective") else "none"),
        recompute_modules=frozenset(recompute.get("modules") or ()),
        recompute_layers=size_of(recompute, "num_layers") if recompute.get("method") == "block" else 0,
        recompute_chunk=size_of(recompute, "num_layers") if recompute.get("method") == "uniform" else 1,
        optimizer=OptimizerOptions(
            offload_fraction=1.0 if offloaded else 0.0, precision_aware=bool(row.get("precision_aware_optimizer"))
        ),
        logits_chunk_tokens=size_of(row, "log_probs_chunk_size", 0),
        reference="swapped" if row.get("ref_model_loaded") else "none",
        trainable_fraction=ADAPTER_SHARE if row.get("lora") else 1.0,
        mtp_layers=1 if row.get("mtp_training") else 0,
        offload_shards=fsdp and "fsdp_cpu_offload" in (row.get("offload") or ()),
    )


def _rollout_layout(row: Row) -> RolloutLayout | None:
    """The engines of a configuration that has any."""
    engine_gpus = size_of(row, "rollout_gpus_per_engine", 0)
    if not engine_gpus:
        return None
    flags = cast("dict[str, Any]", row.get("sglang") or {})
    gpus = _trainer_gpus(row) if row.get("colocate") else size_of(row, "rollout_num_gpus", engine_gpus)
    ep = int(flags.get("ep_size") or flags.get("expert_parallel_size") or 1)
    attention = int(flags.get("dp_size") or 1) if flags.get("enable_dp_attention") else 1
    engines = max(1, gpus // engine_gpus)
    layout = RolloutLayout(engines=engines, tp=engine_gpus, ep=min(ep, engine_gpus), dp_attention=attention)
    return layout if next(layout.problems(), None) is None else RolloutLayout(engines=engines, tp=engine_gpus)


def _engine_share(row: Row, model: ModelArchitecture, rollout: RolloutLayout, gpu: Gpu) -> float:
    """Weights and one longest request over the engine's static share."""
    static = figure_of(row, "sglang_mem_fraction_static", 0.85)
    precision = {"fp8": "fp8", "mxfp8": "mxfp8", "nvfp4": "nvfp4", "int4": "int4"}.get(
        str(row.get("rollout_precision")), "bf16"
    )
    options = RolloutMemoryOptions(weight_precision=precision, mem_fraction_static=static)
    held = rollout_memory(model, rollout, options, gpu)
    longest = size_of(row, "rollout_max_response_len", 4096) + 1024
    per_request = held.state_bytes_per_request + longest * held.kv_bytes_per_token
    return (held.weight_bytes + per_request) / (static * (gpu.usable_bytes - held.outside_bytes))
