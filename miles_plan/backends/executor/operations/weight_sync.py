"""Weight sync: export, transfer, commit, acknowledge. An engine that has not acknowledged a version serves nothing."""

from __future__ import annotations

from collections.abc import Sequence

from miles_plan.backends.engine import EngineError, WeightBucket
from miles_plan.backends.executor.engines import RolloutRank
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome, Wait, places
from miles_plan.backends.executor.operations.publish import publish, release_unwanted
from miles_plan.backends.executor.run_state import wanted_version


def take_weights(rank: RolloutRank, version: int, buckets: Sequence[WeightBucket]) -> int:
    """Take every bucket, then serve the version; until the commit the rank serves nothing. Returns the version held."""
    rank.version = None
    for bucket in buckets:
        rank.engine.update_weights(bucket)
    rank.version = rank.engine.commit_weights(version)
    return rank.version


def weight_sync(context: Context) -> Operation:
    """Bring every rank of the rollout engines to the version this iteration asks for."""
    state, rollout = context.state, context.group
    version = wanted_version(context.flow.graph, context.instance.task, context.instance.iteration, state.weights_made)
    figures: dict[str, float] = {"weight_version": version, "synced_bytes": 0}
    if state.served.get(rollout.slot) != version:
        publication = state.published.get(version)
        if publication is None:
            publication = yield from publish(context, version)
        state.served[rollout.slot] = None
        calls = rollout.call(take_weights, version, publication.buckets)
        acknowledged = yield Wait(f"{places(rollout)}: take weights version {version}", calls)
        if wrong := [place for place, each in zip(rollout.places, acknowledged, strict=True) if each != version]:
            raise EngineError(f"weights version {version} was not acknowledged by {', '.join(wrong)}")
        state.served[rollout.slot] = version
        context.event("weights_acknowledged", f"version {version}", ranks=len(rollout))
        figures["synced_bytes"] = publication.total_bytes
    state.weights_made[context.instance] = version
    yield from release_unwanted(context)
    return Outcome(values={"weights": version}, figures=figures, weight_version=version, digest=str(version))
