"""From a plan to SGLang's ServerArgs: exactly the fields that are set, in one place, by one pure function.

Names and meanings are those of `sglang.srt.server_args.ServerArgs` in SGLang 0.5.16. What the plan has an opinion on is always
set, so that no default of SGLang's decides it; everything else keeps SGLang's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.layout import RolloutLayout
from miles_plan.ir.plan import Plan
from miles_plan.ir.tasks import Logprobs, Rollout

RECEIVER = "miles_plan.backends.sglang_engine.receive.take_bucket"
CHUNKED_PREFILL_TOKENS = 8192  # the chunk that the memory plan counts activations for (`passes.rollout_choices`)
GRAPH_BATCH = 512  # the largest decode batch that the memory plan counts CUDA graphs for (`passes.rollout_choices`)
DTYPES: Mapping[str, str] = {"bf16": "bfloat16", "fp32": "float32", "fp8_blockwise": "bfloat16", "mxfp8": "bfloat16"}
QUANTIZATION: Mapping[str, str | None] = {"bf16": None, "fp32": None, "fp8_blockwise": "fp8", "mxfp8": "mxfp8"}
KV_CACHE: Mapping[str, str] = {"auto": "auto", "bf16": "bf16", "fp8": "fp8_e4m3"}
OWN_KERNELS = "miles_plan"  # the backends that `kernels.cuda.hooks_sglang` registers
OWN_PAGE_TOKENS = (64, 128)  # what they can read
HOPPER = ("h100", "h200", "h800", "h20", "gh200")


class ArgumentsError(ValueError):
    """The plan asks something of SGLang for which there is no argument. field: of the spec; remedy: what to set instead."""

    def __init__(self, message: str, *, code: str, field: str, remedy: str) -> None:
        """`code` is the diagnostic that a run is refused with."""
        super().__init__(message)
        self.code, self.field, self.remedy = code, field, remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerArguments:
    """The fields of ServerArgs that a plan sets, under their own names. One object describes one engine."""

    model_path: str
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    tp_size: int
    pp_size: int
    ep_size: int
    dp_size: int
    enable_dp_attention: bool
    mem_fraction_static: float
    max_total_tokens: int
    max_running_requests: int
    chunked_prefill_size: int
    max_prefill_tokens: int
    page_size: int
    disable_radix_cache: bool
    attention_backend: str
    sampling_backend: str
    cuda_graph_max_bs_decode: int
    disable_prefill_cuda_graph: bool
    enable_deterministic_inference: bool
    enable_return_routed_experts: bool
    enable_memory_saver: bool
    random_seed: int
    skip_tokenizer_init: bool = True  # prompts and responses are token ids on both sides
    skip_server_warmup: bool = True
    trust_remote_code: bool = False
    log_level: str = "warning"
    custom_weight_loader: tuple[str, ...] = (RECEIVER,)

    def as_mapping(self) -> dict[str, Any]:
        """Keyword arguments for `sglang.Engine`."""
        return {**asdict(self), "custom_weight_loader": list(self.custom_weight_loader)}

    def __str__(self) -> str:
        """One line a field, as the run directory keeps it."""
        return "\n".join(f"{field.name} = {getattr(self, field.name)!r}" for field in fields(self))


def server_arguments(plan: Plan, group: DeviceGroup, *, model_directory: Path) -> ServerArguments:
    """What one engine of the group is started with. ArgumentsError where SGLang has no argument for what the plan asks."""
    layout = group.rollout_layout
    assert layout is not None, "a rollout group has a rollout layout"
    task = next((each for each in plan.graph.tasks if isinstance(each, Rollout) and each.group == group.name), None)
    if task is None:
        raise ArgumentsError(
            f"no rollout runs on @{group.name}, so nothing says how its engines are sized",
            code="MP436",
            field="rollout",
            remedy="use rollout.engine: torch for a group that only evaluates",
        )
    if task.speculation is not None:
        raise ArgumentsError(
            "speculative decoding on SGLang: no draft model travels with the policy's weights",
            code="MP436",
            field="rollout.speculative",
            remedy="set rollout.speculative: off",
        )
    precision, kv_cache = plan.run.rollout_dtype, _kv_cache(plan)
    for name, known, field in ((precision, DTYPES, "rollout"), (kv_cache, KV_CACHE, "kv_cache")):
        if name not in known:
            raise ArgumentsError(
                f"SGLang has no {name} here",
                code="MP432",
                field=f"precision.{field}",
                remedy=f"set precision.{field} to {' or '.join(known)}",
            )
    max_running, exact = task.max_running, _exact(plan)
    if exact:
        _check_exact(task, layout, precision)
    return ServerArguments(
        model_path=str(model_directory),
        dtype=DTYPES[precision],
        quantization=QUANTIZATION[precision],
        kv_cache_dtype=KV_CACHE[kv_cache],
        tp_size=layout.tp,
        pp_size=layout.pp,
        ep_size=layout.ep,
        dp_size=layout.dp_attention,
        enable_dp_attention=layout.dp_attention > 1,
        mem_fraction_static=task.static_fraction,
        max_total_tokens=task.kv_pool_tokens // layout.dp_attention,
        max_running_requests=max_running,
        chunked_prefill_size=CHUNKED_PREFILL_TOKENS * layout.dp_attention,  # SGLang divides it among attention ranks
        max_prefill_tokens=CHUNKED_PREFILL_TOKENS,
        page_size=task.page_tokens,
        disable_radix_cache=not task.prefix_sharing,
        attention_backend=OWN_KERNELS if exact else "fa3" if plan.cluster.gpu.lower().startswith(HOPPER) else "triton",
        sampling_backend="pytorch",  # its probabilities are those the log-probs are taken of; our kernels take its place
        cuda_graph_max_bs_decode=min(max_running, GRAPH_BATCH),
        disable_prefill_cuda_graph=True,  # the memory plan has no room for a second set of graphs
        enable_deterministic_inference=exact,
        enable_return_routed_experts=task.record_routing,
        enable_memory_saver=_sleeps(plan, group),
        random_seed=plan.run.seed,
    )


def _check_exact(task: Rollout, layout: RolloutLayout, precision: str) -> None:
    """What this package's kernels inside SGLang cannot do (`kernels.cuda.hooks_sglang`)."""
    if task.page_tokens not in OWN_PAGE_TOKENS:
        pages = " or ".join(map(str, OWN_PAGE_TOKENS))
        raise ArgumentsError(
            f"alignment: exact reads cache pages of {pages} tokens, not {task.page_tokens}",
            code="MP442",
            field="rollout.page_tokens",
            remedy=f"set rollout.page_tokens: {OWN_PAGE_TOKENS[0]}",
        )
    if layout.dp_attention > 1:
        raise ArgumentsError(
            "alignment: exact has no data-parallel attention",
            code="MP442",
            field="rollout.layout.dp_attention",
            remedy="set rollout.layout.dp_attention: 1",
        )
    if task.record_routing and layout.ep != layout.tp:
        raise ArgumentsError(
            f"alignment: exact keeps experts whole: ep={layout.ep} must be tp={layout.tp}",
            code="MP442",
            field="rollout.layout.ep",
            remedy="set rollout.layout.ep to rollout.layout.tp",
        )
    if QUANTIZATION[precision]:
        raise ArgumentsError(
            f"alignment: exact has no kernels for {precision}",
            code="MP432",
            field="precision.rollout",
            remedy="set precision.rollout: bf16",
        )


def _kv_cache(plan: Plan) -> str:
    precision = plan.spec.get("precision", {})
    return str(precision.get("kv_cache", "auto"))


def _exact(plan: Plan) -> bool:
    """Equal bits on both sides need outputs that do not depend on the batch."""
    return any(isinstance(task, Logprobs) and task.alignment == "exact" for task in plan.graph.tasks)


def _sleeps(plan: Plan, group: DeviceGroup) -> bool:
    return any(task.kind in ("offload", "onload") and task.group == group.name for task in plan.graph.tasks)
