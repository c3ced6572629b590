"""The plan that the search picks against the layout that a recipe ships, both priced by the model, for the same job.

python -m benchmarks.bench_shipped_layouts launch_configs.jsonl [--json] [--out benchmarks/results/shipped_layouts.json]

Each row of the file is a launch configuration of Miles or slime. The job is its model, GPUs, batch, lengths, precision and
schedule; a mean response of 40 % of the limit is assumed for both sides, as the planner does where none is stated. Shipped:
its layouts, micro-batches, recomputation, offload and transport. Rows that state their GPU stand apart from those where one is
assumed (the documentation's, else an H200). A shipped layout that does not fit its GPUs by the model is named and left out of
the mean. Exits with 1 if a plan is slower than what is shipped, or the geometric mean is below the goal.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from miles_plan.cost.validation.launch_rows import check_launch, is_launch_row
from miles_plan.cost.validation.row_fields import UnmappedRowError, row_model
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.tasks import Transport
from miles_plan.passes.base import PassContext
from miles_plan.passes.compile import context_of
from miles_plan.passes.joint_search import JointChoice, search_jointly
from miles_plan.passes.layout_space import even_stages
from miles_plan.passes.pair_prices import open_transports, pair_prices
from miles_plan.passes.placements import Run, Side, Split
from miles_plan.passes.rollout_choices import SizedEngines, size_engines
from miles_plan.passes.train_choices import passes_per_step, price_job
from miles_plan.passes.train_prices import size_layouts
from miles_plan.passes.workload import StepWorkload, step_workload
from miles_plan.spec import job_from_mapping

Row = dict[str, Any]
GOAL_MEAN = 1.25
AT_LEAST = 0.999  # equal plans differ in their last digits
TRAIN_FORMATS = {
    "bf16": "bf16",
    "fp8-blockwise": "fp8_blockwise",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "int4-qat(fake)": "int4_qat",
}
ROLLOUT_FORMATS = {"bf16": "bf16", "fp8": "fp8_blockwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4", "int4": "int4"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One configuration: seconds of a step as shipped and as planned, by part; defect: why the shipped one does not fit."""

    id: str
    model: str
    gpu: str
    gpu_stated: bool
    gpus: int
    shipped: str
    planned: str
    shipped_s: float
    planned_s: float
    shipped_parts: dict[str, float]
    planned_parts: dict[str, float]
    defect: str

    @property
    def ratio(self) -> float:
        """Shipped over planned time."""
        return self.shipped_s / self.planned_s


class LeftOutError(Exception):
    """A row that has no shipped joint layout to compare with; the message is the reason."""


def size(row: Row, name: str, default: int = 1) -> int:
    """A positive whole number of the row."""
    value = row.get(name)
    return int(value) if value else default


def job_of(row: Row, gpu: str, gpus: int) -> PassContext:
    """The row's job with everything that a search may choose left open."""
    per_node = min(gpus, size(row, "actor_gpus_per_node", size(row, "num_gpus_per_node", 8)))
    if gpus % per_node:
        per_node = math.gcd(gpus, per_node)
    limit = size(row, "rollout_max_response_len")
    prompts, samples = size(row, "rollout_batch_size"), size(row, "n_samples_per_prompt")
    updates = max(1, round(prompts * samples / size(row, "global_batch_size_effective", prompts * samples)))
    job = {
        "version": 1,
        "name": "shipped",
        "model": {"name": "qwen3-8b"},  # the row's own takes its place below: it may be cut to fewer layers
        "cluster": {"gpu": gpu, "nodes": gpus // per_node, "gpus_per_node": per_node},
        "algorithm": {
            "kind": "gspo" if row.get("algorithm") == "gspo" else "grpo",
            "updates_per_rollout": updates,
            "kl_loss_coef": 0.001 if row.get("ref_model_loaded") else 0.0,
        },
        "data": {"prompts": "prompts.jsonl", "reward": "math"},
        "rollout": {
            "prompts_per_step": prompts,
            "samples_per_prompt": max(2, samples),
            "response_tokens": {"max": limit},
            "over_sampling": max(1.0, size(row, "over_sampling_batch_size", prompts) / prompts),
        },
        "train": {"engine": "fsdp2" if row.get("train_backend") == "fsdp" else "megatron"},
        "precision": {
            "train": named(TRAIN_FORMATS, row.get("train_precision"), "trained in"),
            "rollout": named(ROLLOUT_FORMATS, row.get("rollout_precision"), "served in"),
        },
        "placement": "disaggregate" if row.get("async") else "auto",
        "schedule": {"mode": "one_step_off" if row.get("async") else "synchronous"},
    }
    ctx, _ = context_of(job_from_mapping(job))
    return replace(ctx, model=row_model(row))


def named(formats: dict[str, str], value: Any, what: str) -> str:
    """The spec's name of a number format."""
    if value not in formats:
        raise LeftOutError(f"{what} {value}, which the spec has no name for")
    return formats[str(value)]


def shipped_split(row: Row, ctx: PassContext) -> Split:
    """The GPUs of each side."""
    run = Run(first=0, cluster=ctx.cluster)
    train_gpus = size(row, "actor_num_nodes") * size(row, "actor_gpus_per_node")
    if row.get("colocate"):
        side = Side(run=run, count=train_gpus)
        return Split(kind="colocate", train=side, rollout=side)
    engines = Side(run=run, count=ctx.cluster.num_gpus - train_gpus, offset=train_gpus)
    return Split(kind="disaggregate", train=Side(run=run, count=train_gpus), rollout=engines)


def shipped_train(row: Row, ctx: PassContext, gpus: int) -> TrainLayout:
    """The trainer's layout."""
    if row.get("train_backend") == "fsdp":
        return TrainLayout(dp=gpus)
    tp, pp, cp, vpp = (size(row, name) for name in ("tp", "pp", "cp", "vpp"))
    experts = ctx.model.moe is not None
    first, last = size(row, "decoder_first_pipeline_num_layers", 0), size(row, "decoder_last_pipeline_num_layers", 0)
    stages = even_stages(ctx.model.num_layers, pp * vpp) if vpp == 1 else ()
    if first or last:
        middle = pp * vpp - bool(first) - bool(last)
        rest = ctx.model.num_layers - first - last
        if middle <= 0 or rest <= 0 or rest % middle:
            raise LeftOutError("its stages do not add up to the model's layers")
        stages = ((first,) if first else ()) + (rest // middle,) * middle + ((last,) if last else ())
    return TrainLayout(
        tp=tp,
        pp=pp,
        cp=cp,
        vpp=vpp,
        dp=gpus // (tp * pp * cp),
        ep=size(row, "ep") if experts else 1,
        etp=size(row, "etp") if experts else 1,
        sequence_parallel=tp > 1,
        stage_layers=stages,
    )


def shipped_engines(row: Row, gpus: int) -> RolloutLayout:
    """The engines' layout."""
    tp = size(row, "rollout_gpus_per_engine")
    flags = row.get("sglang") or {}
    ep = min(tp, int(flags.get("ep_size") or flags.get("expert_parallel_size") or 1))
    attention = int(flags.get("dp_size") or 1) if flags.get("enable_dp_attention") else 1
    layout = RolloutLayout(engines=max(1, gpus // tp), tp=tp, ep=ep, dp_attention=attention)
    return layout if next(layout.problems(), None) is None else RolloutLayout(engines=max(1, gpus // tp), tp=tp)


def priced(row: Row, ctx: PassContext, workload: StepWorkload) -> tuple[str, dict[str, float]]:
    """The shipped plan in words, and the seconds of its parts."""
    split = shipped_split(row, ctx)
    train, engines = shipped_train(row, ctx, split.train_gpus), shipped_engines(row, split.rollout_gpus)
    job = price_job(ctx, ctx.cluster, workload)
    granularity = str((row.get("recompute") or {}).get("granularity") or "none")
    recompute = granularity if granularity in ("none", "selective", "full") else "full"
    tokens = size(row, "max_tokens_per_gpu", 8192)
    fixed = replace(
        job,
        recomputes=(recompute,),
        offloads=(bool(row.get("optimizer_cpu_offload")),),
        budgets=lambda _cp: [tokens],
        capacity_bytes=1 << 60,  # whether it fits is `check_launch`'s to say, which knows the recipe's other flags
    )
    table = size_layouts([train], fixed).timed()
    sized = fitting_engines(ctx, split, engines, workload, row)
    choice = sized.simulated()
    asked: dict[str, Transport] = {"p2p": "p2p", "broadcast": "nccl_broadcast"}
    transport = asked.get(str((row.get("update_weight") or {}).get("update_weight_transfer_mode")), "nccl_broadcast")
    transports = (transport,) if split.kind == "disaggregate" else open_transports(ctx, split)
    prices = pair_prices(ctx, split, workload, [train], table.rows, [choice], transports, training_only=True)
    parts = {
        "rollout": choice.rollout_s,
        "train": float(table.rows.step_s[0] + passes_per_step(ctx) * table.rows.log_prob_s[0]),
        "sync": float(prices.sync_s[0, 0]),
        "transition": float(prices.transition_s[0, 0]),
    }
    text = f"{split}; train {train}, recompute {recompute}, {tokens} tokens; rollout {engines}"
    return text, parts


def fitting_engines(ctx: PassContext, split: Split, layout: RolloutLayout, workload: StepWorkload, row: Row) -> SizedEngines:
    """The shipped engines, at their own memory fraction where they hold the job with it, else at ours."""
    stated = row.get("sglang_mem_fraction_static")
    rollout = ctx.job.rollout.model_copy(update={"memory_fraction": float(stated)}) if stated else ctx.job.rollout
    for section in (rollout, ctx.job.rollout):
        other = replace(ctx, job=ctx.job.model_copy(update={"rollout": section}))
        sized = size_engines(other, split.rollout.cluster, layout, workload, resident_bytes=0.0)
        if not isinstance(sized, str):
            return sized
    raise LeftOutError(f"its engines do not hold the job by the model: {sized}")


def step_of(parts: dict[str, float], overlapping: bool) -> float:
    """Seconds of a step from its parts, as the search adds them."""
    if overlapping:
        return max(parts["train"], parts["rollout"] + parts["sync"])
    return sum(parts.values())


def compare(row: Row) -> Comparison:
    """Price both. LeftOutError or UnmappedRowError say why a row has no comparison."""
    for name, reason in (("lora", "adapters"), ("use_critic", "a critic"), ("opd", "a teacher"), ("loss_type", "no rollout")):
        if row.get(name):
            raise LeftOutError(f"{reason}: not a job that the search places")
    if not row.get("rollout_gpus_per_engine") or not row.get("total_gpus") or not row.get("rollout_max_response_len"):
        raise LeftOutError("engines, GPUs or lengths are not stated")
    check = check_launch(row)
    train_gpus = size(row, "actor_num_nodes") * size(row, "actor_gpus_per_node")
    total = size(row, "total_gpus")
    gpus = train_gpus if row.get("colocate") else total
    if not row.get("colocate") and total <= train_gpus:
        raise LeftOutError("its rollout GPUs are not stated")
    ctx = job_of(row, check.gpu.name, gpus)
    workload = step_workload(ctx)
    shipped, parts = priced(row, ctx, workload)
    found = search_jointly(ctx, workload)
    if not found.front:
        raise LeftOutError("the search finds no plan that fits")
    best = found.front[0]
    return Comparison(
        id=str(row["id"]),
        model=ctx.model.name,
        gpu=check.gpu.name,
        gpu_stated=check.gpu_stated,
        gpus=gpus,
        shipped=shipped,
        planned=planned_text(best),
        shipped_s=step_of(parts, bool(row.get("async"))),
        planned_s=best.step_s,
        shipped_parts=parts,
        planned_parts={
            "rollout": best.rollout.rollout_s,
            "train": best.train_s,
            "sync": best.sync_s,
            "transition": best.transition_s,
        },
        defect="" if check.fits else check.defect,
    )


def planned_text(choice: JointChoice) -> str:
    """The plan in words."""
    train = choice.train
    offload = ", optimizer on the host" if train.optimizer_offload else ""
    return (
        f"{choice.split}; train {train.layout}, recompute {train.recompute}, {train.tokens_per_gpu} tokens{offload}; "
        f"rollout {choice.rollout.layout}"
    )


def comparisons(rows: Sequence[Row], left_out: Counter[str]) -> Iterator[Comparison]:
    """Every row that has one; the others are counted by reason."""
    for row in rows:
        if not is_launch_row(row) or row.get("kind") == "doc_table":
            left_out["a table of the documentation, not a launch configuration"] += 1
            continue
        try:
            yield compare(row)
        except (LeftOutError, UnmappedRowError) as reason:
            left_out[str(reason)] += 1


def geometric_mean(ratios: Sequence[float]) -> float:
    """The geometric mean; nan of nothing."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


def summary(found: Sequence[Comparison]) -> dict[str, Any]:
    """Figures of some comparisons: those whose shipped layout fits count."""
    ratios = [each.ratio for each in found if not each.defect]
    return {
        "compared": len(ratios),
        "shipped_does_not_fit": len(found) - len(ratios),
        "slower": sum(ratio < AT_LEAST for ratio in ratios),
        "smallest": min(ratios, default=math.nan),
        "geometric_mean": geometric_mean(ratios),
        "largest": max(ratios, default=math.nan),
    }


def main() -> int:
    """Compare, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    left_out: Counter[str] = Counter()
    found = list(comparisons(rows, left_out))
    sides = {
        "GPU stated": [each for each in found if each.gpu_stated],
        "GPU assumed": [each for each in found if not each.gpu_stated],
        "all": found,
    }
    figures = {name: summary(part) for name, part in sides.items()}
    record = {
        "machine": machine(),
        "figures": figures,
        "left_out": dict(left_out.most_common()),
        "configurations": [asdict(each) | {"ratio": each.ratio} for each in found],
    }
    if args.json:
        print(json.dumps(record, indent=1))
    else:
        print_table(sides, figures, left_out)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    whole = figures["all"]
    return int(whole["slower"] > 0 or not whole["geometric_mean"] >= GOAL_MEAN)


def print_table(sides: dict[str, list[Comparison]], figures: dict[str, dict[str, Any]], left_out: Counter[str]) -> None:
    """One line a configuration, then the figures."""
    for name in ("GPU stated", "GPU assumed"):
        print(f"\n{name}")
        for each in sorted(sides[name], key=lambda one: -one.ratio):
            fits = f"  shipped does not fit: {each.defect}" if each.defect else ""
            times = f"{each.ratio:5.2f}x  {each.shipped_s:9.2f} s -> {each.planned_s:9.2f} s"
            print(f"  {times}  {each.id} ({each.gpus} {each.gpu}){fits}")
            print(f"          shipped  {each.shipped}")
            print(f"          planned  {each.planned}")
    for name, part in figures.items():
        print(
            f"{name}: {part['compared']} compared, {part['shipped_does_not_fit']} shipped layouts do not fit, "
            f"{part['slower']} planned slower, ratio {part['smallest']:.2f} to {part['largest']:.2f}, "
            f"geometric mean {part['geometric_mean']:.2f}"
        )
    for reason, count in left_out.most_common():
        print(f"left out: {count} x {reason}")


if __name__ == "__main__":
    sys.exit(main())
