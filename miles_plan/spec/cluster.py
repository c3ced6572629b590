"""`cluster:` the machines the job may use."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from miles_plan.spec.section import Section
from miles_plan.spec.types import AutoOr, CatalogName, FilePath, Gbps, Gib, Size


class NodeFields(Section):
    """Nodes that are alike."""

    gpu: CatalogName | None = None
    """The GPU of each node; `miles-plan gpus` lists the names."""
    nodes: Size = 1
    """Number of nodes."""
    gpus_per_node: AutoOr[Size] = "auto"
    """GPUs of one node; `auto` is what nodes of this GPU have."""
    gpu_memory_gib: AutoOr[Gib] = "auto"
    """Memory of one GPU in GiB; `auto` is the catalog's figure."""
    host_memory_gib: AutoOr[Gib] = "auto"
    """Host memory of one node in GiB; `auto` is the catalog's usual node."""
    nic_gbps_per_gpu: AutoOr[Gbps] = "auto"
    """Network bandwidth between nodes in gigabits per second for each GPU; `auto` is the catalog's usual node."""
    profile: FilePath | None = None
    """What such a machine was measured to reach, a file that `miles-plan calibrate` writes; without it, the shipped profile."""


class NodeGroupSpec(NodeFields):
    """One group of nodes that are alike, in a cluster of several groups."""

    gpu: CatalogName
    """The GPU of each node; `miles-plan gpus` lists the names."""


class ClusterSpec(NodeFields):
    """Either nodes that are all alike (`gpu`, `nodes`, ...) or `groups` of such."""

    groups: Annotated[tuple[NodeGroupSpec, ...], Field(strict=False, max_length=256)] = ()
    """Groups of different nodes, instead of the fields above."""
