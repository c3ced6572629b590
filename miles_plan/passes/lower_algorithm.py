"""Spec to logical graph: the tasks of one iteration of each loop, and what flows between them, with no GPU named yet.

The policy loop is the same shape for every algorithm on samples: sync weights, draw prompts, roll out, score, compute
log-probs and advantages, train. What an algorithm changes is which estimator turns rewards into advantages, how the loss is
clipped and averaged, and which other models are asked. Those choices stand in one table, `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from miles_plan.ir.graph import Fact, Loop, TaskGraph
from miles_plan.ir.options import Aggregation, LossOptions, OptimizerOptions, RatioLevel, SamplingOptions
from miles_plan.ir.plan import Decision
from miles_plan.ir.tasks import (
    Advantage,
    AnyTask,
    Checkpoint,
    Edge,
    Evaluate,
    FilterGroups,
    Logprobs,
    Payload,
    Prompts,
    Reward,
    Rollout,
    TrainStep,
    Values,
    WeightSync,
)
from miles_plan.passes.base import Outcome, Pass, PassContext
from miles_plan.spec.algorithm import CriticSpec
from miles_plan.spec.job import JobSpec
from miles_plan.spec.train import OptimizerFields, OptimizerSpec

Estimator = Literal["group", "leave_one_out", "reinforce_plus_plus", "gae", "distillation"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What sets one algorithm apart: its advantage, the level of its ratio, its average, its clip, its models."""

    estimator: Estimator
    normalize_std: bool
    ratio_level: RatioLevel
    aggregation: Aggregation
    clip_high: float | None  # None = as the lower clip
    critic: bool = False
    teacher: bool = False
    filters_groups: bool = False


RECIPES: dict[str, Recipe] = {
    "grpo": Recipe("group", True, "token", "sequence_mean", None),  # arXiv 2402.03300
    "dapo": Recipe("group", True, "token", "token_mean", 0.28, filters_groups=True),  # arXiv 2503.14476
    "gspo": Recipe("group", True, "sequence", "sequence_mean", None),  # arXiv 2507.18071
    "rloo": Recipe("leave_one_out", False, "token", "sequence_mean", None),  # arXiv 2402.14740
    "reinforce_plus_plus": Recipe("reinforce_plus_plus", True, "token", "token_mean", None),  # arXiv 2501.03262
    "ppo": Recipe("gae", True, "token", "token_mean", None, critic=True),  # arXiv 1707.06347
    "distillation": Recipe("distillation", False, "token", "token_mean", None, teacher=True),  # on-policy: arXiv 2306.13649
}


@dataclass(frozen=True)
class LowerAlgorithm(Pass):
    """Make the logical graph of the job's algorithm."""

    name: ClassVar[str] = "lower_algorithm"
    gives: ClassVar[frozenset[Fact]] = frozenset({"logical"})

    def run(self, graph: TaskGraph, ctx: PassContext) -> Outcome:
        """One loop for a warm start if the spec has one, one for the algorithm."""
        job = ctx.job
        tasks, edges = _warm_start(job)
        if job.algorithm.kind == "sft":
            more_tasks, more_edges = _supervised(job)
        else:
            more_tasks, more_edges = _policy_loop(job, warm=bool(tasks))
        loops = [Loop(name="warm_start", iterations=job.warm_start.steps)] if job.warm_start else []
        loops.append(Loop(name=_main_loop(job), iterations=job.algorithm.steps))
        lowered = TaskGraph(name=job.name, loops=tuple(loops)).with_tasks([*tasks, *more_tasks], [*edges, *more_edges])
        return Outcome(graph=lowered, decisions=tuple(_decisions(job)))


def _main_loop(job: JobSpec) -> str:
    return "sft" if job.algorithm.kind == "sft" else "rl"


def _edge(src: str, dst: str, carries: Payload, distance: int = 0) -> Edge:
    return Edge(src=src, dst=dst, carries=carries, distance=distance)


def _warm_start(job: JobSpec) -> tuple[list[AnyTask], list[Edge]]:
    """Supervised steps before the first rollout."""
    warm = job.warm_start
    if warm is None:
        return [], []
    demonstrations = Prompts(
        name="warm_start_data",
        loop="warm_start",
        source="warm_start.data",
        rows="demonstrations",
        prompts_per_step=warm.batch_size,
        seed=job.seed,
    )
    train = TrainStep(
        name="warm_start_train",
        loop="warm_start",
        loss=LossOptions(kind="sft"),
        optimizer=_optimizer(warm, total_steps=warm.steps),
        nonfinite=job.failures.nonfinite,
    )
    save = Checkpoint(name="warm_start_checkpoint", loop="warm_start", every=warm.steps, keep=job.checkpoint.keep)
    edges = [
        _edge("warm_start_data", "warm_start_train", "samples"),
        _edge("warm_start_train", "warm_start_train", "weights", 1),
        _edge("warm_start_train", "warm_start_checkpoint", "weights"),
    ]
    return [demonstrations, train, save], edges


def _supervised(job: JobSpec) -> tuple[list[AnyTask], list[Edge]]:
    """SFT as the job itself."""
    data = Prompts(
        name="data",
        loop="sft",
        source="data.prompts",
        rows="demonstrations",
        prompts_per_step=job.rollout.prompts_per_step,
        shuffle=job.data.shuffle,
        seed=job.seed,
    )
    train = TrainStep(
        name="train",
        loop="sft",
        loss=LossOptions(kind="sft"),
        optimizer=_optimizer(job.train.optimizer, total_steps=job.algorithm.steps),
        updates=job.algorithm.updates_per_rollout,
        nonfinite=job.failures.nonfinite,
    )
    tasks: list[AnyTask] = [data, train]
    edges = [_edge("data", "train", "samples"), _edge("train", "train", "weights", 1)]
    if job.evaluation.every_steps:
        tasks.append(WeightSync(name="weight_sync", loop="sft", every=job.evaluation.every_steps))
        edges.append(_edge("train", "weight_sync", "weights"))
    return _with_saves(job, tasks, edges)


def _policy_loop(job: JobSpec, *, warm: bool) -> tuple[list[AnyTask], list[Edge]]:
    """The loop of every algorithm that samples from its policy."""
    recipe = RECIPES[job.algorithm.kind]
    tasks: list[AnyTask] = [WeightSync(name="weight_sync", loop="rl"), _prompts(job), _rollout(job)]
    edges = [
        _edge("train", "weight_sync", "weights", 1),
        _edge("prompts", "rollout", "prompts"),
        _edge("weight_sync", "rollout", "weights"),
    ]
    if job.data.reward is not None:
        tasks.append(_reward(job, job.data.reward))
        edges.append(_edge("rollout", "reward", "samples"))
    if warm:
        edges += [_edge("warm_start_train", "weight_sync", "weights"), _edge("warm_start_train", "train", "weights")]
    samples, rewards = "rollout", "reward"
    if recipe.filters_groups or job.rollout.dynamic_sampling.enabled:
        tasks.append(
            FilterGroups(
                name="filter_groups",
                loop="rl",
                keep_prompts=job.rollout.prompts_per_step,
                max_rounds=job.rollout.dynamic_sampling.max_rounds,
            )
        )
        edges += [_edge("rollout", "filter_groups", "samples"), _edge("reward", "filter_groups", "rewards")]
        samples = rewards = "filter_groups"
    forwards = list(_forward_passes(job, recipe))
    tasks += forwards
    for forward in forwards:
        edges.append(_edge(samples, forward.name, "samples"))
        if forward.name == "old_log_probs":
            edges.append(_edge("train", forward.name, "weights", 1))
    tasks += [_advantage(job, recipe), _train_step(job, recipe)]
    edges += _learning_edges(job, recipe, forwards, samples=samples, rewards=rewards)
    if recipe.critic:
        tasks.append(_critic_step(job))
        edges += [_edge(samples, "train_critic", "samples"), _edge("advantage", "train_critic", "advantages")]
        edges.append(_edge("values", "train_critic", "values"))
    return _with_saves(job, tasks, edges)


def _prompts(job: JobSpec) -> Prompts:
    drawn = round(job.rollout.prompts_per_step * job.rollout.over_sampling)
    limit = job.data.max_prompt_tokens
    if limit == "auto":
        limit = job.rollout.prompt_tokens.max
    return Prompts(
        name="prompts",
        loop="rl",
        source="data.prompts",
        prompts_per_step=drawn,
        samples_per_prompt=job.rollout.samples_per_prompt,
        max_prompt_tokens=0 if limit == "auto" else limit,
        shuffle=job.data.shuffle,
        seed=job.seed,
    )


def _sampling(job: JobSpec, *, temperature: float) -> SamplingOptions:
    return SamplingOptions(
        max_response_tokens=job.rollout.response_tokens.max,
        temperature=temperature,
        top_p=job.rollout.top_p,
        top_k=job.rollout.top_k,
        seed=job.seed,
    )


def _rollout(job: JobSpec) -> Rollout:
    over_sampled = job.rollout.over_sampling > 1.0
    return Rollout(
        name="rollout",
        loop="rl",
        sampling=_sampling(job, temperature=job.rollout.temperature),
        samples_per_prompt=job.rollout.samples_per_prompt,
        keep_prompts=job.rollout.prompts_per_step if over_sampled else 0,
        partial=job.rollout.partial,
        prefix_sharing=job.rollout.prefix_sharing,
    )


def _reward(job: JobSpec, reward: str) -> Reward:
    workers = job.data.reward_workers
    return Reward(
        name="reward",
        loop="rl",
        reward=reward,
        timeout_s=job.data.reward_timeout_s,
        on_failure=job.data.reward_failure,
        workers=1 if workers == "auto" else workers,
    )


def _forward_passes(job: JobSpec, recipe: Recipe) -> Iterator[AnyTask]:
    """Forward passes of the trainer: old policy always, reference where a KL asks for it, teacher and critic by algorithm."""
    temperature = job.rollout.temperature or 1.0
    yield Logprobs(name="old_log_probs", loop="rl", model="policy", temperature=temperature, compare_with_rollout=True)
    if job.algorithm.kl_loss_coef or job.algorithm.kl_reward_coef:
        yield Logprobs(name="reference_log_probs", loop="rl", model="reference", temperature=temperature)
    if recipe.teacher:
        yield Logprobs(name="teacher_log_probs", loop="rl", model="teacher", temperature=temperature)
    if recipe.critic:
        yield Values(name="values", loop="rl")


def _advantage(job: JobSpec, recipe: Recipe) -> Advantage:
    algorithm = job.algorithm
    normalize = recipe.normalize_std if algorithm.normalize_std == "auto" else algorithm.normalize_std
    return Advantage(
        name="advantage",
        loop="rl",
        estimator=recipe.estimator,
        normalize_std=normalize,
        gamma=algorithm.gamma,
        gae_lambda=algorithm.gae_lambda,
        kl_reward_coef=algorithm.kl_reward_coef,
    )


def _train_step(job: JobSpec, recipe: Recipe) -> TrainStep:
    algorithm = job.algorithm
    usual = algorithm.clip if recipe.clip_high is None else max(recipe.clip_high, algorithm.clip)
    loss = LossOptions(
        kind="policy_gradient",
        clip_low=algorithm.clip,
        clip_high=usual if algorithm.clip_high == "auto" else algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        ratio_level=recipe.ratio_level,
        kl_coef=algorithm.kl_loss_coef,
        kl_estimator=algorithm.kl_estimator,
        entropy_coef=algorithm.entropy_coef,
        aggregation=recipe.aggregation if algorithm.aggregation == "auto" else algorithm.aggregation,
        aggregation_constant=float(job.rollout.response_tokens.max) if algorithm.aggregation == "constant" else 0.0,
    )
    return TrainStep(
        name="train",
        loop="rl",
        loss=loss,
        optimizer=_optimizer(job.train.optimizer, total_steps=algorithm.steps * algorithm.updates_per_rollout),
        updates=algorithm.updates_per_rollout,
        temperature=job.rollout.temperature or 1.0,
        nonfinite=job.failures.nonfinite,
    )


def _critic_step(job: JobSpec) -> TrainStep:
    critic = job.algorithm.critic or CriticSpec()
    optimizer = _optimizer(job.train.optimizer, total_steps=job.algorithm.steps)
    return TrainStep(
        name="train_critic",
        loop="rl",
        model="critic",
        loss=LossOptions(kind="policy_gradient"),
        optimizer=replace(optimizer, learning_rate=critic.lr, warmup_steps=critic.warmup_steps),
        nonfinite=job.failures.nonfinite,
    )


def _optimizer(options: OptimizerFields, *, total_steps: int) -> OptimizerOptions:
    return OptimizerOptions(
        learning_rate=options.lr,
        beta1=options.beta1,
        beta2=options.beta2,
        epsilon=options.epsilon,
        weight_decay=options.weight_decay,
        clip_grad_norm=options.clip_grad_norm,
        warmup_steps=options.warmup_steps,
        schedule=options.schedule,
        total_steps=total_steps,
        min_learning_rate=options.min_lr,
        precision_aware=isinstance(options, OptimizerSpec) and options.precision_aware,
        moments=options.moments if isinstance(options, OptimizerSpec) else "fp32",
    )


def _learning_edges(job: JobSpec, recipe: Recipe, forwards: list[AnyTask], *, samples: str, rewards: str) -> Iterator[Edge]:
    """What the advantage and the training step take."""
    yield _edge(samples, "advantage", "samples")
    if job.data.reward is not None:
        yield _edge(rewards, "advantage", "rewards")
    for forward in forwards:
        if isinstance(forward, Values):
            yield _edge("values", "advantage", "values")
        elif recipe.teacher or job.algorithm.kl_reward_coef:
            yield _edge(forward.name, "advantage", "log_probs")
    yield _edge(samples, "train", "samples")
    yield _edge("advantage", "train", "advantages")
    for forward in forwards:
        if forward.name == "old_log_probs" or (forward.name == "reference_log_probs" and job.algorithm.kl_loss_coef):
            yield _edge(forward.name, "train", "log_probs")
    yield _edge("train", "train", "weights", 1)


def _with_saves(job: JobSpec, tasks: list[AnyTask], edges: list[Edge]) -> tuple[list[AnyTask], list[Edge]]:
    """The loop with its checkpoints and, where asked, its evaluations."""
    loop = _main_loop(job)
    every = job.checkpoint.every_steps
    interval = max(1, job.algorithm.steps // 10) if every == "auto" else every
    tasks = [*tasks, Checkpoint(name="checkpoint", loop=loop, every=interval, keep=job.checkpoint.keep)]
    edges = [*edges, _edge("train", "checkpoint", "weights")]
    if job.evaluation.every_steps:
        tasks.append(
            Evaluate(
                name="evaluate",
                loop=loop,
                every=job.evaluation.every_steps,
                source="evaluation.prompts",
                sampling=_sampling(job, temperature=0.0 if job.evaluation.samples_per_prompt == 1 else job.rollout.temperature),
                samples_per_prompt=job.evaluation.samples_per_prompt,
                reward=job.data.reward or "exact_match",
                timeout_s=job.data.reward_timeout_s,
            )
        )
        edges.append(_edge("weight_sync", "evaluate", "weights"))
    return tasks, edges


def _decisions(job: JobSpec) -> Iterator[Decision]:
    """What `auto` became."""
    recipe = RECIPES.get(job.algorithm.kind)
    if recipe is not None and job.algorithm.aggregation == "auto":
        yield Decision(
            field="algorithm.aggregation",
            value=recipe.aggregation,
            reason=f"what {job.algorithm.kind} is defined with",
            by=LowerAlgorithm.name,
        )
    if job.checkpoint.every_steps == "auto":
        every = max(1, job.algorithm.steps // 10)
        yield Decision(
            field="checkpoint.every_steps",
            value=str(every),
            reason=f"ten checkpoints in {job.algorithm.steps} steps",
            by=LowerAlgorithm.name,
        )
