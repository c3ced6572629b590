"""Collectives by topology: a group of n ranks, k of which share an NVLink domain, on rails of one NIC a GPU.

Ring and pairwise algorithms as NCCL runs them: an all-gather moves (n-1)/n of the buffer through each GPU; between
nodes each of a node's k members drives its own NIC, so the node's share of the ring is k NICs wide. Bytes are of the
whole buffer, as in nccl-tests; times hold for every rank at once. Arrays broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from miles_plan.catalog.gpus import Cluster, Gpu
from miles_plan.cost.profile import HardwareProfile, profile_for

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
Floats = NDArray[np.float64]

_PASSES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


@dataclass(frozen=True, slots=True)
class Links:
    """The links of a cluster as the models see them: the slowest kind of GPU decides."""

    gpu: Gpu
    profile: HardwareProfile
    domain: int
    rdma: bool = True

    def nvlink(self, op: str) -> float:
        """Reached bytes/s of one GPU inside the domain."""
        return self.gpu.nvlink_bytes_per_s * self.profile.nvlink_bus_fraction[op]

    def nic(self, op: str) -> float:
        """Reached bytes/s of one GPU's NIC; plain TCP reaches a quarter of it."""
        fraction = self.profile.rdma_bus_fraction[op]
        return self.gpu.nic_bytes_per_s * fraction * (1.0 if self.rdma else 0.25)


def links_of(cluster: Cluster, profile: HardwareProfile | None = None) -> Links:
    """The links of a cluster: domain is the NVLink domain, never smaller than reaching a node's GPUs allows."""
    slowest = min(cluster.groups, key=lambda group: group.gpu.nvlink_bytes_per_s)
    gpu = slowest.gpu
    domain = gpu.nvlink_domain if gpu.nvlink_domain > gpu.gpus_per_node else min(gpu.nvlink_domain, cluster.gpus_per_node)
    rdma = all(group.rdma for group in cluster.groups)
    return Links(gpu, profile or profile_for(gpu), max(1, domain), rdma)


def ranks_in_domain(ranks: ArrayLike, stride: ArrayLike, domain: int) -> Floats:
    """How many of a group's ranks, `stride` apart, share an NVLink domain with one of them."""
    return np.asarray(np.clip(domain // np.asarray(stride, dtype=np.float64), 1.0, np.asarray(ranks, dtype=np.float64)))


def collective_s(op: Collective, size_bytes: ArrayLike, ranks: ArrayLike, local: ArrayLike, links: Links) -> Floats:
    """Seconds of one collective over `ranks` ranks, `local` of them in each NVLink domain; 0 for a single rank."""
    size, n, k = (np.asarray(each, dtype=np.float64) for each in (size_bytes, ranks, local))
    n, k = np.maximum(n, 1.0), np.maximum(np.minimum(local, n), 1.0)
    if op == "all_to_all":
        inside = size * (k - 1) / n / links.nvlink(op)
        outside = size * (n - k) / n / links.nic(op)
    else:
        inside = _PASSES[op] * size * (n - 1) / n / links.nvlink(op)
        outside = np.where(n > k, _PASSES[op] * size * (n - k) / n / (k * links.nic(op)), 0.0)
    moving = np.maximum(inside, outside)
    start = links.profile.nvlink_latency_s + np.where(n > k, links.profile.rdma_latency_s, 0.0) * np.log2(
        np.maximum(n / k, 1.0) + 1.0
    )
    return np.asarray(np.where(n > 1, moving + start, 0.0))


def dispatch_s(
    token_bytes: ArrayLike, topk: int, ranks: ArrayLike, local: ArrayLike, links: Links, once_a_node: bool
) -> Floats:
    """Seconds to send tokens to their experts' ranks, or back.

    Args:
        token_bytes: bytes of all of a rank's tokens, each counted once.
        once_a_node: copies for experts of one NVLink domain cross between domains once and are copied inside it
            (DeepEP, HybridEP); otherwise every copy travels alone (all-to-all).
    """
    size = np.asarray(token_bytes, dtype=np.float64)
    n = np.maximum(np.asarray(ranks, dtype=np.float64), 1.0)
    k = np.maximum(np.minimum(np.asarray(local, dtype=np.float64), n), 1.0)
    domains = n / k
    copies_out = topk * (n - k) / n
    if once_a_node:
        copies_out = np.minimum(copies_out, (domains - 1.0) * (1.0 - (1.0 - 1.0 / domains) ** topk))
    inside = size * topk * (k - 1) / np.where(once_a_node, k, n) / links.nvlink("all_to_all")
    outside = size * copies_out / links.nic("all_to_all")
    start = links.profile.nvlink_latency_s + np.where(n > k, links.profile.rdma_latency_s, 0.0)
    return np.asarray(np.where(n > 1, np.maximum(inside, outside) + start, 0.0))


def point_to_point_s(size_bytes: ArrayLike, crosses_nodes: ArrayLike, links: Links) -> Floats:
    """Seconds of one send between neighbours of a pipeline."""
    size, crosses = np.asarray(size_bytes, dtype=np.float64), np.asarray(crosses_nodes, dtype=bool)
    inside = links.profile.nvlink_latency_s + size / links.nvlink("p2p")
    between = links.profile.rdma_latency_s + size / links.nic("p2p")
    return np.asarray(np.where(crosses, between, inside))
