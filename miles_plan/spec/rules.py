"""Rules between fields that need no planning: what excludes, needs, orders or divides what.

A rule names the sections it looks at and runs as soon as those are valid, whatever is wrong elsewhere, so that all mistakes
are told at once. Its findings name the field at fault; the loader adds the place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from miles_plan.spec.algorithm import AlgorithmSpec
from miles_plan.spec.cluster import ClusterSpec
from miles_plan.spec.data import DataSpec, WarmStartSpec
from miles_plan.spec.execution import ScheduleSpec
from miles_plan.spec.kinds import number_text
from miles_plan.spec.model import ModelSpec, TokenizerSpec
from miles_plan.spec.operations import EvaluationSpec
from miles_plan.spec.rollout import (
    DynamicSamplingSpec,
    PromptTokensSpec,
    ResponseTokensSpec,
    RolloutLayoutSpec,
    RolloutSpec,
    SpeculativeSpec,
)
from miles_plan.spec.section import Section
from miles_plan.spec.train import OptimizerFields, OptimizerSpec, TrainLayoutSpec, TrainSpec

UNKNOWN = object()
GROUP_RELATIVE = ("grpo", "gspo", "rloo", "dapo")
WITHOUT_REWARD = ("sft", "distillation")


@dataclass(frozen=True, slots=True)
class Breach:
    """A rule that does not hold: code, the field to point at (dotted, from the root of the spec), message and help."""

    code: str
    field: str
    message: str
    help: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """`check` gets the values at `needs` (dotted paths) and yields what is wrong.

    It runs when all of them are valid, and sections: `auto` or an absent section has nothing to check, unless `words` says so.
    """

    needs: tuple[str, ...]
    check: Callable[..., Iterator[Breach]]
    words: bool = False


def _one_model_source(path: str) -> Rule:
    def check(model: ModelSpec) -> Iterator[Breach]:
        sources = ("name", "hf_config", "checkpoint", "architecture")
        given = [name for name in sources if getattr(model, name) is not None]
        if len(given) != 1:
            found = "none is given" if not given else f"{' and '.join(f'`{name}`' for name in given)} are given"
            yield Breach(
                "MP130",
                f"{path}.{given[1]}" if given else path,
                f"`{path}` needs exactly one of {', '.join(f'`{name}`' for name in sources)}; {found}",
                "keep one; set the other to `null` where it comes from a `base:` file" if given else "name the model",
            )

    return Rule((path,), check)


def _tokenizer_source(path: str) -> Rule:
    def check(tokenizer: TokenizerSpec) -> Iterator[Breach]:
        if (tokenizer.characters is None) == (tokenizer.path is None):
            yield Breach("MP130", path, f"`{path}` needs exactly one of `characters` and `path`")
        if tokenizer.characters is not None and (twice := _repeated(tokenizer.characters)):
            yield Breach("MP123", f"{path}.characters", f"`{path}.characters` has {twice!r} twice", "each is one token")

    return Rule((path,), check)


def _one_kind_of_cluster(cluster: ClusterSpec) -> Iterator[Breach]:
    if bool(cluster.groups) == (cluster.gpu is not None):
        found = "both are given" if cluster.groups else "none is given"
        yield Breach("MP130", "cluster", f"`cluster` needs exactly one of `gpu` and `groups`; {found}")
    elif cluster.groups:
        for name in sorted(cluster.model_fields_set - {"groups", "gpu"}):
            yield Breach("MP131", f"cluster.{name}", f"`cluster.{name}` does not go with `groups`", "set it in each group")


def _algorithm_fits_itself(algorithm: AlgorithmSpec) -> Iterator[Breach]:
    kind = algorithm.kind
    if algorithm.clip_high != "auto" and algorithm.clip_high < algorithm.clip:
        yield Breach(
            "MP132",
            "algorithm.clip_high",
            f"`algorithm.clip_high` is {algorithm.clip_high:g}, below `clip` {algorithm.clip:g}",
            "raise `clip_high` or lower `clip`; `auto` makes them equal",
        )
    if 0 < algorithm.dual_clip <= 1:
        yield Breach("MP123", "algorithm.dual_clip", f"`algorithm.dual_clip` must be 0 or above 1, got {algorithm.dual_clip:g}")
    if algorithm.kl_loss_coef and algorithm.kl_reward_coef:
        yield Breach(
            "MP131",
            "algorithm.kl_reward_coef",
            "`kl_loss_coef` and `kl_reward_coef` penalise the same divergence twice",
            "set one of them to 0",
        )
    if algorithm.critic is not None and kind != "ppo":
        yield Breach("MP133", "algorithm.critic", f"`{kind}` has no critic", "remove `critic`, or use `kind: ppo`")
    if kind == "distillation" and algorithm.teacher is None:
        yield Breach("MP133", "algorithm.kind", "`distillation` needs `algorithm.teacher`", "add `teacher: {model: {...}}`")
    if algorithm.teacher is not None and kind != "distillation":
        yield Breach("MP133", "algorithm.teacher", f"`{kind}` has no teacher", "remove `teacher`, or use `kind: distillation`")


def _batch_divides(algorithm: AlgorithmSpec, rollout: RolloutSpec) -> Iterator[Breach]:
    prompts, samples, updates = rollout.prompts_per_step, rollout.samples_per_prompt, algorithm.updates_per_rollout
    if prompts * samples % updates:
        yield Breach(
            "MP134",
            "algorithm.updates_per_rollout",
            f"{prompts:,} prompts x {samples:,} samples = {prompts * samples:,}, not a multiple of {updates:,} updates",
            f"use a divisor of {prompts * samples:,}",
        )
    if algorithm.kind in GROUP_RELATIVE and samples < 2:
        yield Breach(
            "MP150",
            "rollout.samples_per_prompt",
            f"`{algorithm.kind}` compares the samples of a prompt and needs at least 2, `samples_per_prompt` is {samples}",
            "8 is usual",
        )
    if algorithm.kind == "sft" and samples != 1:
        yield Breach(
            "MP134",
            "rollout.samples_per_prompt",
            f"`sft` trains on the data's answers: `samples_per_prompt` must be 1, got {samples:,}",
        )


def _dynamic_sampling_compares(rollout: RolloutSpec, dynamic: DynamicSamplingSpec) -> Iterator[Breach]:
    if dynamic.enabled and rollout.samples_per_prompt < 2:
        yield Breach(
            "MP150",
            "rollout.dynamic_sampling.enabled",
            "dynamic sampling compares the rewards of a prompt and needs `samples_per_prompt` of at least 2",
        )


def _response_lengths_ordered(lengths: ResponseTokensSpec) -> Iterator[Breach]:
    place = "rollout.response_tokens"
    ordered = [(name, getattr(lengths, name)) for name in ("mean", "p99", "max")]
    given = [(name, value) for name, value in ordered if value != "auto"]
    for (low, smaller), (high, larger) in pairwise(given):
        if smaller > larger:
            yield Breach(
                "MP132", f"{place}.{low}", f"`{place}.{low}` is {number_text(smaller)}, above `{high}` {number_text(larger)}"
            )
    if lengths.histogram is not None:
        for name in ("mean", "p99"):
            if getattr(lengths, name) != "auto":
                yield Breach(
                    "MP131", f"{place}.{name}", f"`{place}.{name}` and `histogram` both describe the lengths", "keep one"
                )


def _prompt_lengths_ordered(lengths: PromptTokensSpec) -> Iterator[Breach]:
    if lengths.mean != "auto" and lengths.max != "auto" and lengths.mean > lengths.max:
        message = f"`rollout.prompt_tokens.mean` is {number_text(lengths.mean)}, above `max` {lengths.max:,}"
        yield Breach("MP132", "rollout.prompt_tokens.mean", message)


def _prompt_limits_agree(data: DataSpec, lengths: PromptTokensSpec) -> Iterator[Breach]:
    limit = data.max_prompt_tokens
    if limit != "auto" and lengths.max != "auto" and lengths.max > limit:
        yield Breach(
            "MP132",
            "rollout.prompt_tokens.max",
            f"`rollout.prompt_tokens.max` is {lengths.max:,}, but `data.max_prompt_tokens` refuses prompts above {limit:,}",
        )


def _speculation_consistent(speculative: SpeculativeSpec) -> Iterator[Breach]:
    tokens, steps = speculative.draft_tokens, speculative.steps
    if tokens != "auto" and speculative.topk == 1 and tokens != steps + 1:
        yield Breach(
            "MP132",
            "rollout.speculative.draft_tokens",
            f"with `topk: 1` a draft of {steps} steps verifies {steps + 1} tokens, `draft_tokens` is {tokens}",
            "leave `draft_tokens` out",
        )


def _warmup_within_run(algorithm: AlgorithmSpec, optimizer: OptimizerFields) -> Iterator[Breach]:
    total = algorithm.steps * algorithm.updates_per_rollout
    yield from _schedule_ordered("train.optimizer", optimizer, total, "`steps` x `updates_per_rollout`")


def _warm_start_ordered(warm_start: WarmStartSpec) -> Iterator[Breach]:
    yield from _schedule_ordered("warm_start", warm_start, warm_start.steps, "`warm_start.steps`")


def _schedule_ordered(place: str, optimizer: OptimizerFields, total: int, total_name: str) -> Iterator[Breach]:
    if optimizer.warmup_steps > total:
        yield Breach(
            "MP132",
            f"{place}.warmup_steps",
            f"`{place}.warmup_steps` is {optimizer.warmup_steps:,}, above {total_name} = {total:,}",
        )
    if optimizer.min_lr > optimizer.lr:
        yield Breach("MP132", f"{place}.min_lr", f"`{place}.min_lr` is {optimizer.min_lr:g}, above `lr` {optimizer.lr:g}")


def _optimizer_consistent(train: TrainSpec, optimizer: OptimizerSpec) -> Iterator[Breach]:
    if optimizer.moments == "bf16" and not optimizer.precision_aware:
        message = "`train.optimizer.moments: bf16` needs an optimizer that reads them"
        yield Breach("MP131", "train.optimizer.moments", message, "add `precision_aware: true`")
    if optimizer.offload_fraction < 1.0 and optimizer.offload == "off":
        message = "`train.optimizer.offload_fraction` is a share of nothing with `offload: off`"
        yield Breach("MP131", "train.optimizer.offload_fraction", message, "remove it, or use `offload: host`")
    if train.engine == "megatron":
        return
    only = {"optimizer.precision_aware": optimizer.precision_aware, "release": train.release != "auto"}
    only |= {"gradients": train.gradients != "fp32", "optimizer.offload_fraction": optimizer.offload_fraction < 1.0}
    for name in (name for name, given in only.items() if given):
        message = f"`train.{name}` is Megatron's, the trainer is `{train.engine}`"
        yield Breach("MP131", f"train.{name}", message, "remove it, or use `engine: megatron`")


def _train_sizes_divide(layout: TrainLayoutSpec) -> Iterator[Breach]:
    place = "train.layout"
    if layout.vpp > 1 and layout.pp == 1:
        yield Breach("MP132", f"{place}.vpp", f"`{place}.vpp` is {layout.vpp}, which needs `pp` above 1")
    chunks = layout.pp * layout.vpp
    if layout.stage_layers and len(layout.stage_layers) != chunks:
        message = f"`{place}.stage_layers` names {len(layout.stage_layers)} chunks, pp x vpp = {chunks}"
        yield Breach("MP132", f"{place}.stage_layers", message)
    if layout.dp != "auto" and (layout.tp * layout.cp * layout.dp) % (layout.ep * layout.etp):
        dense, expert = layout.tp * layout.cp * layout.dp, layout.ep * layout.etp
        yield Breach("MP132", f"{place}.ep", f"ep x etp = {expert} must divide tp x cp x dp = {dense}")


def _rollout_sizes_divide(layout: RolloutLayoutSpec) -> Iterator[Breach]:
    for name in ("ep", "dp_attention"):
        if layout.tp % getattr(layout, name):
            message = f"`rollout.layout.{name}` = {getattr(layout, name)} must divide tp = {layout.tp}"
            yield Breach("MP132", f"rollout.layout.{name}", message)


def _reward_present(algorithm: AlgorithmSpec, data: DataSpec) -> Iterator[Breach]:
    if data.reward is None and algorithm.kind not in WITHOUT_REWARD:
        yield Breach(
            "MP133",
            "data.reward",
            f"`{algorithm.kind}` needs `data.reward`",
            "add `reward: math`, `exact_match`, or `package.module:function`",
        )


def _evaluation_has_prompts(evaluation: EvaluationSpec) -> Iterator[Breach]:
    if evaluation.every_steps and evaluation.prompts is None:
        yield Breach("MP133", "evaluation.every_steps", "`evaluation.every_steps` needs `evaluation.prompts`")


def _staleness_fits_mode(schedule: ScheduleSpec) -> Iterator[Breach]:
    bound = schedule.max_staleness
    if bound == "auto":
        return
    if schedule.mode in ("auto", "synchronous") and bound > 0:
        yield Breach(
            "MP131",
            "schedule.max_staleness",
            f"a synchronous schedule trains on fresh samples only, `max_staleness` is {bound}",
            "remove it, or use `mode: one_step_off` or `asynchronous`",
        )
    if schedule.mode in ("one_step_off", "asynchronous") and bound == 0:
        yield Breach(
            "MP131",
            "schedule.max_staleness",
            f"`{schedule.mode}` trains on samples of older weights, which `max_staleness: 0` forbids",
            "use 1 or more, or `mode: synchronous`",
        )


def _overlap_needs_own_gpus(schedule: ScheduleSpec, placement: object) -> Iterator[Breach]:
    if placement == "colocate" and schedule.mode in ("one_step_off", "asynchronous"):
        yield Breach(
            "MP131",
            "schedule.mode",
            f"`{schedule.mode}` runs rollout and training at once, `placement: colocate` puts them on the same GPUs in turn",
            "use `placement: disaggregate`",
        )


def _repeated(text: str) -> str:
    """A character that occurs twice, or nothing."""
    return next((character for character, times in Counter(text).items() if times > 1), "")


RULES: tuple[Rule, ...] = (
    _one_model_source("model"),
    _one_model_source("algorithm.teacher.model"),
    _tokenizer_source("model.tokenizer"),
    _tokenizer_source("algorithm.teacher.model.tokenizer"),
    Rule(("cluster",), _one_kind_of_cluster),
    Rule(("algorithm",), _algorithm_fits_itself),
    Rule(("algorithm", "rollout"), _batch_divides),
    Rule(("rollout", "rollout.dynamic_sampling"), _dynamic_sampling_compares),
    Rule(("rollout.response_tokens",), _response_lengths_ordered),
    Rule(("rollout.prompt_tokens",), _prompt_lengths_ordered),
    Rule(("data", "rollout.prompt_tokens"), _prompt_limits_agree),
    Rule(("rollout.speculative",), _speculation_consistent),
    Rule(("algorithm", "train.optimizer"), _warmup_within_run),
    Rule(("warm_start",), _warm_start_ordered),
    Rule(("train", "train.optimizer"), _optimizer_consistent),
    Rule(("train.layout",), _train_sizes_divide),
    Rule(("rollout.layout",), _rollout_sizes_divide),
    Rule(("algorithm", "data"), _reward_present),
    Rule(("evaluation",), _evaluation_has_prompts),
    Rule(("schedule",), _staleness_fits_mode),
    Rule(("schedule", "placement"), _overlap_needs_own_gpus, words=True),
)


def breaches(value_at: Callable[[str], object]) -> Iterator[Breach]:
    """What the rules find. `value_at` gives the validated value at a path, or `UNKNOWN` if it is absent or wrong."""
    for rule in RULES:
        values = [value_at(path) for path in rule.needs]
        if all(value is not UNKNOWN and (rule.words or isinstance(value, Section)) for value in values):
            yield from rule.check(*values)
