"""Ray for one run: loopback only, no dashboard, token authentication, and a clean end whatever happens."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles_plan.backends.executor.failures import RunError
from miles_plan.backends.executor.janitor import MARKER, Belongings, Janitor, clean_up
from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.plan import ClusterSummary, Plan

PLANNED_GPU = "planned_gpu"
PLACEMENT_WAIT_S = 30.0
TOKEN_NAME = "token"

# Ray reads these when it is imported or when it starts its processes.
RAY_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the switch that makes every server of a node bind to 127.0.0.1
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "GLOO_SOCKET_IFNAME": "lo",
    # Compute threads that wait by spinning stall each other as soon as anything else runs: with two threads on two busy cores a
    # step of the quickstart took 20 times as long (10.5 s instead of 0.2 s to generate).
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    # SGLang starts its ranks so; a trainer that sends them weights must agree with them on how NCCL shares memory.
    "NCCL_CUMEM_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
}


@dataclass
class Session:
    """A Ray cluster that this process started, with all that must go when it ends."""

    belongings: Belongings
    janitor: Janitor
    started_s: float
    placements: dict[str, Any] = field(default_factory=dict)

    def place(self, bundles: Mapping[str, list[Mapping[str, float]]]) -> dict[str, Any]:
        """One placement group a part of the plan, all of them there when this returns. RunError names what is missing."""
        import ray
        from ray.util.placement_group import placement_group

        made = {}
        for name, wanted in bundles.items():
            group = placement_group([dict(bundle) for bundle in wanted], strategy="PACK", name=f"miles-plan-{name}")
            self.placements[name] = made[name] = group
        deadline = time.monotonic() + PLACEMENT_WAIT_S
        for name, group in made.items():
            if not group.wait(max(0.1, deadline - time.monotonic())):
                free = dict(ray.available_resources())  # type: ignore[no-untyped-call]  # ray leaves it untyped
                raise RunError(
                    "MP420",
                    f"the GPUs of {name} are still not there after {PLACEMENT_WAIT_S:.0f} s: "
                    f"wanted {_sum(bundles[name])}, free {_only(free, _sum(bundles[name]))}",
                    help="another job holds them; end it, or wait and start again",
                )
        return made

    def release_placements(self, names: Sequence[str]) -> None:
        """Give placed resources back, to be placed anew."""
        from ray.util.placement_group import remove_placement_group

        for name in names:
            if name in self.placements:
                remove_placement_group(self.placements.pop(name))

    def close(self) -> list[str]:
        """Stop Ray and everything that carries the session's marker; returns what had to be killed."""
        with contextlib.suppress(
            Exception
        ):  # a start that was cut short leaves Ray half there; what it started is killed below
            import ray

            ray.shutdown()
        found = clean_up(self.belongings, spare=frozenset({os.getpid()}))
        self.janitor.dismiss()
        os.environ.pop(MARKER, None)
        return [each for each in found if each.startswith("process")]


def start_session(plan: Plan, while_ray_starts: Callable[[Belongings], None]) -> Session:
    """Start Ray with what the plan needs and check that the machine has it. RunError says what does not match.

    `while_ray_starts` runs before Ray does, and is told what there will be to clean up; what it starts belongs to the session.
    """
    began = time.monotonic()
    marker = secrets.token_hex(6)
    temporary = Path(tempfile.mkdtemp(prefix="mplan-", dir=_short_temporary()))  # 0700; Unix sockets allow 107 characters
    belongings = Belongings(marker=marker, temporary=str(temporary))
    os.environ.update(RAY_ENVIRONMENT)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token_file(temporary))
    os.environ["PYTHONPATH"] = import_path()
    os.environ[MARKER] = marker
    janitor = Janitor(belongings)
    try:
        while_ray_starts(belongings)
        _init_ray(plan, temporary)
        session = Session(belongings=belongings, janitor=janitor, started_s=time.monotonic() - began)
        check_cluster(plan.cluster, plan.graph, _nodes())
    except BaseException as error:
        Session(belongings=belongings, janitor=janitor, started_s=0.0).close()
        if isinstance(error, SystemExit):  # how Ray's own handler answers SIGTERM
            raise KeyboardInterrupt from error
        raise
    return session


def _init_ray(plan: Plan, temporary: Path) -> None:
    import ray

    on_cpu = is_cpu(plan.cluster)
    num_gpus = plan.cluster.num_gpus
    try:
        with _only_what_is_needed():
            ray.init(
                address="local",
                num_cpus=max(2, os.cpu_count() or 2),
                num_gpus=0 if on_cpu else None,
                resources={PLANNED_GPU: num_gpus} if on_cpu else None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                object_store_memory=object_store_bytes(),
                _temp_dir=str(temporary),
            )
    except Exception as error:
        raise RunError(
            "MP421",
            f"Ray did not start: {_first_line(error)}",
            help=f"its logs were in {temporary}; a full disk or too little shared memory are the usual causes",
        ) from error


@contextlib.contextmanager
def _only_what_is_needed() -> Iterator[None]:
    """Inside, Ray starts without the three processes that a run has no use for, and stays silent about workers that die.

    The autoscaler's monitor, the log monitor and the server of the dashboard that is off take 1.5 s of CPU and open ports; the
    essay that Ray prints to standard output for each dead worker is a line of our event log. Neither has a public switch (Ray
    2.60); in a release that names these methods otherwise they start as before.
    """
    from ray._private import node, worker

    worker._worker_logs_enabled = False
    needless = ("start_api_server", "start_monitor", "start_log_monitor")
    before = {name: getattr(node.Node, name) for name in needless if hasattr(node.Node, name)}
    try:
        for name in before:
            setattr(node.Node, name, lambda *_, **__: None)
        yield
    finally:
        for name, method in before.items():
            setattr(node.Node, name, method)


def import_path() -> str:
    """PYTHONPATH of the actors: where this package lies, and the working directory, so that a job's own reward is found."""
    root = str(Path(__file__).resolve().parents[3])
    return os.pathsep.join(dict.fromkeys(part for part in (root, os.getcwd(), os.environ.get("PYTHONPATH", "")) if part))


def object_store_bytes() -> int:
    """Shared memory for Ray's objects: a tenth of what is free, at least 128 MiB, at most 16 GiB."""
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 1 << 30
    return int(min(16 << 30, max(128 << 20, free // 10)))


def is_cpu(cluster: ClusterSummary) -> bool:
    """Whether the plan's "GPUs" are ranks on a CPU."""
    return cluster.gpu == "cpu"


def bundle(cluster: ClusterSummary) -> Mapping[str, float]:
    """What one GPU actor asks Ray for."""
    return {PLANNED_GPU: 1.0} if is_cpu(cluster) else {"GPU": 1.0}


def check_cluster(cluster: ClusterSummary, graph: TaskGraph, nodes: list[Mapping[str, Any]]) -> None:
    """Compare what the plan is for with the nodes Ray found. RunError (MP422) gives the difference."""
    resource = PLANNED_GPU if is_cpu(cluster) else "GPU"
    per_node = sorted((int(node["Resources"].get(resource, 0)) for node in nodes), reverse=True)
    needed = math.ceil(max((group.gpus.end for group in graph.groups if group.gpus is not None), default=0))
    if sum(per_node) < needed:
        raise RunError(
            "MP422",
            f"the plan uses {needed} GPUs ({cluster.gpu}, {cluster.nodes} x {cluster.gpus_per_node}), "
            f"this cluster has {sum(per_node)} on {len(nodes)} node{'s' if len(nodes) != 1 else ''}",
            help="compile the spec again for the cluster that is there (cluster.nodes, cluster.gpus_per_node)",
        )
    if is_cpu(cluster):
        return
    kinds = {
        name.removeprefix("accelerator_type:") for node in nodes for name in node["Resources"] if "accelerator_type:" in name
    }
    if kinds and not any(_same_gpu(cluster.gpu, kind) for kind in kinds):
        raise RunError(
            "MP422",
            f"the plan is for {cluster.gpu} GPUs, this cluster has {', '.join(sorted(kinds))}",
            help="compile the spec again with cluster.gpu set to what is there",
        )


def _same_gpu(planned: str, found: str) -> bool:
    return planned.lower().replace("-", "").startswith(found.lower().replace("-", "")[:4])


def _nodes() -> list[Mapping[str, Any]]:
    import ray

    nodes: list[Mapping[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # ray leaves it untyped
    return [node for node in nodes if node["Alive"]]


def _token_file(folder: Path) -> Path:
    """A fresh token in a file that only this user can read; a token this process already uses stays the same."""
    path = folder / TOKEN_NAME
    loaded = sys.modules.get("ray") is not None and os.environ.get("RAY_AUTH_TOKEN_PATH")
    token = secrets.token_hex(32)
    if loaded and Path(loaded).is_file():
        token = Path(loaded).read_text(encoding="ascii")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token)
    return path


def free_port() -> int:
    """A TCP port on the loopback device that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _short_temporary() -> str | None:
    """/tmp where it is writable: Ray's socket paths must stay short, and TMPDIR can be long."""
    return "/tmp" if os.access("/tmp", os.W_OK) else None


def _sum(bundles: list[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for each in bundles:
        for name, amount in each.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _only(resources: Mapping[str, float], wanted: Mapping[str, float]) -> dict[str, float]:
    return {name: resources.get(name, 0.0) for name in wanted}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
