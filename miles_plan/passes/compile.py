"""From a loaded job to a plan: resolve the model and the cluster, run the pipeline, and gather everything into one record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from miles_plan import __version__
from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.gpus import Cluster, NodeGroup, find_gpu
from miles_plan.catalog.hardware_profile import HardwareProfile
from miles_plan.catalog.hf_config import architecture_from_hf_config
from miles_plan.catalog.models import find_model
from miles_plan.cost.lengths import load_lengths
from miles_plan.cost.profile import load_profile, profile_for, shipped_constants
from miles_plan.diagnostics import Diagnostic, Location, PlanError, error, warning
from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.plan import ClusterSummary, DataSource, Decision, ModelSource, Plan, RunOptions, TokenizerSource
from miles_plan.passes.base import Instrument, Outcome, Pass, PassContext, Pipeline
from miles_plan.passes.pipeline import DEFAULT
from miles_plan.spec.cluster import ClusterSpec, NodeGroupSpec
from miles_plan.spec.data import ArithmeticPrompts
from miles_plan.spec.job import JobSpec
from miles_plan.spec.load import LoadedJob
from miles_plan.spec.model import ModelSpec, TokenizerSpec

GIB = 1 << 30
COMPILER = "compile"  # the ledger's name for what is read outside any pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A plan, and what was found on the way that does not stop it."""

    plan: Plan
    diagnostics: tuple[Diagnostic, ...]


def compile_job(loaded: LoadedJob, *, passes: Sequence[Pass] = DEFAULT, instruments: Sequence[Instrument] = ()) -> Compiled:
    """Compile a job. PlanError holds every finding of the first stage that found errors, each with its place."""
    with loaded.ledger.reading_as(COMPILER):
        ctx, run = context_of(loaded)
    empty = TaskGraph(name=loaded.spec.name, loops=())
    try:
        outcome = Pipeline(passes=tuple(passes), instruments=instruments).run(empty, ctx)
    except PlanError as refused:
        raise PlanError(refused.diagnostics, loaded.sources) from None
    unread = tuple(path for path in loaded.ledger.unread() if loaded.origins.of(path).kind != "default")
    diagnostics = (*outcome.diagnostics, *_unread_warnings(loaded, unread))
    plan = _plan(loaded, ctx, run, replace(outcome, diagnostics=diagnostics), unread)
    return Compiled(plan=plan, diagnostics=diagnostics)


def context_of(loaded: LoadedJob) -> tuple[PassContext, RunOptions]:
    """What passes read, and what the executor will need beyond the graph. PlanError for names that nothing goes by."""
    found: list[Diagnostic] = []
    model, source = _model(loaded, loaded.spec.model, "model", found)
    cluster = _cluster(loaded, found)
    teacher, teacher_source = None, None
    if (asked := loaded.spec.algorithm.teacher) is not None:
        teacher, teacher_source = _model(loaded, asked.model, "algorithm.teacher.model", found)
        found += _other_tokenizer(loaded, asked.model)
    found += _unreadable_lengths(loaded)
    if model is None or source is None or cluster is None or found:
        raise PlanError(tuple(found), loaded.sources)
    ctx = PassContext(
        job=loaded.spec,
        model=model,
        teacher=teacher,
        cluster=cluster,
        locate=loaded.at,
        file=loaded.file,
        ledger=loaded.ledger,
    )
    return ctx, run_options(loaded, source, teacher_source)


def _unreadable_lengths(loaded: LoadedJob) -> Iterator[Diagnostic]:
    """A file of lengths is read here once, so that what is wrong with it has the field's place."""
    name, field = loaded.spec.rollout.response_tokens.histogram, "rollout.response_tokens.histogram"
    if name is None:
        return
    try:
        load_lengths(loaded.file(name))
    except ValueError as problem:
        yield error("MP146", str(problem), loaded.at(field), field=field, help='write {"lengths": [...]}, or a number a line')


def _other_tokenizer(loaded: LoadedJob, teacher: ModelSpec) -> Iterator[Diagnostic]:
    """A teacher scores the policy's token ids, so both must mean the same by them."""
    if teacher.tokenizer not in ("auto", loaded.spec.model.tokenizer):
        field = "algorithm.teacher.model.tokenizer"
        yield error(
            "MP133",
            "the teacher has another tokenizer than the policy, and scores the policy's token ids",
            loaded.at(field),
            field=field,
            help="leave it out: the policy's tokenizer is used",
        )


def _model(
    loaded: LoadedJob, spec: ModelSpec, place: str, found: list[Diagnostic]
) -> tuple[ModelArchitecture | None, ModelSource | None]:
    """The architecture, and where its weights come from: the catalog, a config file, a checkpoint, or the spec itself."""
    if spec.name is not None:
        try:
            model = find_model(spec.name)
        except ValueError as unknown:
            found.append(error("MP140", str(unknown), loaded.at(f"{place}.name"), field=f"{place}.name"))
            return None, None
        return model, _source(loaded, spec, model, None)
    field = "hf_config" if spec.hf_config else "checkpoint" if spec.checkpoint else "architecture"
    try:
        config = _hf_config(loaded, spec)
        name = str(config.get("_name_or_path") or loaded.spec.name)
        model = architecture_from_hf_config(config, name)
    except (OSError, ValueError, TypeError, AttributeError) as unreadable:  # a config is somebody's JSON
        where = loaded.at(f"{place}.{field}")
        found.append(error("MP143", f"the model's configuration cannot be used: {unreadable}", where, field=f"{place}.{field}"))
        return None, None
    return model, _source(loaded, spec, model, config)


def _source(loaded: LoadedJob, spec: ModelSpec, model: ModelArchitecture, hf_config: Mapping[str, Any] | None) -> ModelSource:
    return ModelSource(
        name=model.name,
        hf_config=hf_config if spec.checkpoint is None else None,
        checkpoint=_absolute(loaded, spec.checkpoint),
        params_total=model.params_total,
        params_active=model.params_active,
    )


def _hf_config(loaded: LoadedJob, spec: ModelSpec) -> dict[str, Any]:
    if spec.architecture is not None:
        return dict(spec.architecture)
    path = loaded.file(spec.hf_config) if spec.hf_config else loaded.file(spec.checkpoint or "") / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no mapping")
    return config


def _cluster(loaded: LoadedJob, found: list[Diagnostic]) -> Cluster | None:
    spec = loaded.spec.cluster
    try:
        cluster = Cluster(groups=tuple(_nodes(group) for group in spec.groups or (spec,)))
    except ValueError as unknown:
        found.append(error("MP141", str(unknown), loaded.at("cluster.gpu"), field="cluster.gpu"))
        return None
    return _with_profiles(loaded, cluster, found)


def _with_profiles(loaded: LoadedJob, cluster: Cluster, found: list[Diagnostic]) -> Cluster:
    """The cluster with the profiles that its spec names, each for every node with that GPU: prices are by kind of GPU."""
    spec, profiles = loaded.spec.cluster, dict[str, tuple[str, HardwareProfile]]()
    for at, group in enumerate(cluster.groups):
        field, name = (
            (f"cluster.groups.{at}.profile", spec.groups[at].profile) if spec.groups else ("cluster.profile", spec.profile)
        )
        if name is None:
            continue
        known = profiles.get(group.gpu.name)
        if known is not None and known[0] != name:
            message = f"two profiles for {group.gpu.name}: `{known[0]}` and `{name}`"
            found.append(error("MP145", message, loaded.at(field), field=field, help="keep one for each kind of GPU"))
            continue
        try:
            profiles[group.gpu.name] = name, load_profile(loaded.file(name), group.gpu)
        except (OSError, ValueError) as unusable:
            found.append(error("MP145", f"the hardware profile cannot be used: {unusable}", loaded.at(field), field=field))
    groups = (
        replace(group, gpu=replace(group.gpu, profile=profiles[group.gpu.name][1])) if group.gpu.name in profiles else group
        for group in cluster.groups
    )
    return Cluster(groups=tuple(groups))


def _profile_sources(cluster: Cluster) -> tuple[tuple[str, str], ...]:
    """The profile files and their SHA-256, each once: a plan says what it was priced with."""
    profiles = (group.gpu.profile for group in cluster.groups)
    return tuple(dict.fromkeys((each.here.file, each.here.sha256) for each in profiles if each and each.here))


def _profile_decisions(cluster: Cluster) -> Iterator[Decision]:
    """What each profile of the user's priced, and what stayed as shipped; and which kinds of GPU nobody measured."""
    kinds = {group.gpu.name: group.gpu for group in cluster.groups}
    for name, gpu in kinds.items():
        used = profile_for(gpu)
        if used.basis == "roofline" and gpu.vendor != "cpu":
            yield Decision(
                field="cluster.profile",
                value=f"no data for {name}",
                reason=f"priced with {used.source.partition(' (')[0]} on its datasheet; intervals are wider for it, and "
                "`miles-plan calibrate` on such a GPU narrows them",
                by=COMPILER,
            )
    for name, here in {name: gpu.profile for name, gpu in kinds.items()}.items():
        if here is None or here.here is None:
            continue
        rest = shipped_constants(here)
        yield Decision(
            field="cluster.profile",
            value=here.here.file,
            reason=f"{name} priced as measured on {here.date or 'an unstated date'}: {', '.join(here.here.constants)}; "
            f"from the shipped profile ({here.here.shipped_basis}): {', '.join(rest) or 'nothing'}; sha256 {here.here.sha256}",
            by=COMPILER,
        )


def _nodes(spec: ClusterSpec | NodeGroupSpec) -> NodeGroup:
    """One group of equal nodes; what the spec states takes the place of the catalog's figure."""
    gpu = find_gpu(spec.gpu or "")
    if spec.gpu_memory_gib != "auto":
        stated = int(spec.gpu_memory_gib * GIB)
        gpu = replace(gpu, memory_bytes=stated, usable_bytes=min(stated, int(stated * gpu.usable_bytes / gpu.memory_bytes)))
    if spec.nic_gbps_per_gpu != "auto":
        gpu = replace(gpu, nic_bytes_per_s=spec.nic_gbps_per_gpu * 1e9 / 8)
    return NodeGroup(
        gpu=gpu,
        nodes=spec.nodes,
        gpus_per_node=gpu.gpus_per_node if spec.gpus_per_node == "auto" else spec.gpus_per_node,
        host_memory_bytes=0 if spec.host_memory_gib == "auto" else int(spec.host_memory_gib * GIB),
    )


def run_options(loaded: LoadedJob, model: ModelSource, teacher: ModelSource | None) -> RunOptions:
    """What the executor needs beyond the graph; paths are absolute, so that a plan can be run from anywhere."""
    job = loaded.spec
    return RunOptions(
        seed=job.seed,
        model=model,
        teacher=teacher,
        tokenizer=_tokenizer(loaded),
        data=tuple(_data_sources(loaded)),
        train_dtype=job.precision.train,
        rollout_dtype=job.precision.rollout,
        max_restarts=job.failures.max_restarts,
        tensorboard=job.tracking.tensorboard,
        code_directory=str(loaded.directory.resolve()),
    )


def _absolute(loaded: LoadedJob, name: str | None) -> str | None:
    return None if name is None else str(loaded.file(name).resolve())


def _tokenizer(loaded: LoadedJob) -> TokenizerSource:
    model = loaded.spec.model
    spec = model.tokenizer
    if isinstance(spec, TokenizerSpec):
        if spec.characters is not None:
            return TokenizerSource(kind="characters", characters=spec.characters)
        return TokenizerSource(kind="file", path=_absolute(loaded, spec.path) or "")
    beside = model.checkpoint or (str(Path(model.hf_config).parent) if model.hf_config else None)
    if spec == "auto" and beside is not None:
        return TokenizerSource(kind="file", path=_absolute(loaded, beside) or "")
    return TokenizerSource(kind="byte")


def _data_sources(loaded: LoadedJob) -> Iterator[DataSource]:
    job = loaded.spec
    named: list[tuple[str, str | ArithmeticPrompts | None]] = [("data.prompts", job.data.prompts)]
    if job.warm_start is not None:
        named.append(("warm_start.data", job.warm_start.data))
    if job.evaluation.every_steps:
        named.append(("evaluation.prompts", job.evaluation.prompts))
    for name, prompts in named:
        if isinstance(prompts, ArithmeticPrompts):
            yield DataSource(name=name, generator=prompts.generator, options=_arithmetic_options(prompts))
        else:
            yield DataSource(name=name, path=_absolute(loaded, prompts))


def _arithmetic_options(prompts: ArithmeticPrompts) -> dict[str, Any]:
    """The generator's options under the names that `miles_plan.data.arithmetic.ArithmeticOptions` gives them."""
    return {
        "seed": prompts.seed,
        "largest": prompts.max_operand,
        "eval_problems": prompts.held_out,
        "demonstrations": prompts.demonstrations,
        "slips": prompts.slips,
    }


def _unread_warnings(loaded: LoadedJob, unread: Sequence[str]) -> Iterator[Diagnostic]:
    """A field that the user set and nothing read: it decides nothing in this job."""
    for path in unread:
        yield warning(
            "MP160",
            f"{path} is set, and nothing in this job reads it",
            loaded.at(path),
            field=path,
            help="remove it, or check that the part it belongs to is in use",
        )


def _plan(loaded: LoadedJob, ctx: PassContext, run: RunOptions, outcome: Outcome, unread: Sequence[str]) -> Plan:
    reward = loaded.spec.data.reward
    return Plan(
        name=loaded.spec.name,
        tool_version=__version__,
        spec=loaded.resolved(),
        spec_sha256=loaded.sha256(),
        sources=(
            *((name, hashlib.sha256(text.encode()).hexdigest()) for name, text in loaded.sources.items()),
            *_profile_sources(ctx.cluster),
        ),
        cluster=_cluster_summary(ctx.cluster),
        run=run,
        graph=outcome.graph,
        decisions=(*_profile_decisions(ctx.cluster), *outcome.decisions),
        estimates=outcome.estimates,
        candidates=outcome.candidates,
        transfers=outcome.transfers,
        numerics=outcome.numerics,
        failures=outcome.failures,
        environment=(*_environment(loaded.spec), *outcome.environment),
        imports=(reward,) if reward is not None and ":" in reward else (),
        unread_fields=tuple(unread),
        diagnostics=tuple(as_json(diagnostic) for diagnostic in outcome.diagnostics),
    )


def as_json(diagnostic: Diagnostic) -> dict[str, Any]:
    """A finding as the plan file keeps it."""
    where: Location | None = diagnostic.location
    return {
        "code": diagnostic.code,
        "severity": diagnostic.severity,
        "message": diagnostic.message,
        "location": str(where) if where else None,
        "help": diagnostic.help,
    }


def _cluster_summary(cluster: Cluster) -> ClusterSummary:
    first = cluster.groups[0]
    return ClusterSummary(
        gpu=first.gpu.name,
        nodes=cluster.num_nodes,
        gpus_per_node=first.gpus_per_node,
        gpu_memory_bytes=min(group.gpu.usable_bytes for group in cluster.groups),
        host_memory_bytes=min(group.node_memory_bytes for group in cluster.groups),
        groups=() if len(cluster.groups) == 1 else tuple((g.gpu.name, g.nodes, g.gpus_per_node) for g in cluster.groups),
    )


# Releases that were seen to run together on H200s on 2026-11-21.
PINS = {
    "torch": (("ray", ">=2.50"), ("torch", ">=2.8"), ("transformers", ">=5.0")),
    "megatron": (("megatron-core", "0.19.2"), ("transformer-engine", "2.13.0"), ("ray", "2.55.1")),
    "fsdp2": (("torch", ">=2.8"), ("transformers", ">=5.0")),
    "sglang": (("sglang", "0.5.16"), ("torch_memory_saver", "0.0.10")),
}


def _environment(job: JobSpec) -> tuple[tuple[str, str], ...]:
    return tuple(dict.fromkeys((*PINS[job.train.engine], *PINS[job.rollout.engine])))
