"""Weight sync: export, transfer, commit, acknowledge. An engine that has not acknowledged a version serves nothing."""

from __future__ import annotations

from miles_plan.backends.executor.operations.deliver import deliver
from miles_plan.backends.executor.operations.operation import Context, Operation, Outcome
from miles_plan.backends.executor.operations.publish import release_unwanted
from miles_plan.backends.executor.run_state import wanted_version


def weight_sync(context: Context) -> Operation:
    """Bring every rank of the rollout engines to the version this iteration asks for."""
    state, rollout = context.state, context.group
    version = wanted_version(context.flow.graph, context.instance.task, context.instance.iteration, state.weights_made)
    figures: dict[str, float] = {"weight_version": version, "synced_bytes": 0}
    if state.served.get(rollout.slot) != version:
        state.served[rollout.slot] = None
        delivered = yield from deliver(context, rollout, version)
        state.served[rollout.slot] = version
        context.event("weights_acknowledged", f"version {version}", ranks=len(rollout), probes=delivered.probes)
        figures["synced_bytes"] = delivered.total_bytes
    state.weights_made[context.instance] = version
    yield from release_unwanted(context)
    return Outcome(values={"weights": version}, figures=figures, weight_version=version, digest=str(version))
