"""GPUs, links and clusters as data: what a datasheet promises; what is reached is the cost models' business.

Rates are dense (without structured sparsity). `h200` is nominal 141 GB; what a process can use is what the driver
reports, measured where we have it. Bandwidths are one-way a GPU.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from miles_plan.catalog.hardware_profile import HardwareProfile

Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "mxfp8", "nvfp4", "int8", "int4"]

_GB = 10**9
_GIB = 1 << 30
_TERA = 10**12


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator and the machine it usually sits in.

    memory_bytes: nominal; usable_bytes: what the driver offers an empty process. flops: dense FLOP/s by precision, a
    missing precision is not supported. nvlink: GPUs that reach each other at nvlink_bytes_per_s each way. profile: what
    the user measured such a machine to reach, instead of the shipped profile.
    """

    name: str
    vendor: Literal["nvidia", "amd", "cpu"]
    memory_bytes: int
    usable_bytes: int
    hbm_bytes_per_s: float
    flops: Mapping[str, float] = field(hash=False)
    nvlink_domain: int
    nvlink_bytes_per_s: float
    nic_bytes_per_s: float
    pcie_bytes_per_s: float
    gpus_per_node: int
    host_memory_bytes: int
    sms: int
    launch_s: float
    source: str
    profile: HardwareProfile | None = field(default=None, hash=False, repr=False)

    def rate(self, precision: str) -> float:
        """Dense FLOP/s at a precision.

        Raises:
            ValueError: the chip has no such arithmetic.
        """
        if precision in self.flops:
            return self.flops[precision]
        raise ValueError(f"{self.name} has no {precision} arithmetic, only {', '.join(self.flops)}")


_USABLE = 0.981
"""Share of nominal memory a process can take; H200: 150,110,011,392 of 151,397,597,184 bytes less what the driver
keeps (0.65 GB idle, measured with the tables in profiles/h200.json)."""


def _nvidia(
    name: str,
    memory_gb: float,
    hbm_tb_per_s: float,
    tera: Mapping[str, float],
    *,
    nvlink_gb_per_s: float,
    domain: int = 8,
    nic_gb_per_s: float = 50.0,
    pcie_gb_per_s: float = 55.0,
    per_node: int = 8,
    host_gib: int = 2048,
    sms: int = 132,
    launch_s: float = 4.0e-6,
    vendor: Literal["nvidia", "amd"] = "nvidia",
    source: str,
) -> Gpu:
    memory = int(memory_gb * _GB)
    return Gpu(
        name=name,
        vendor=vendor,
        memory_bytes=memory,
        usable_bytes=int(memory * _USABLE),
        hbm_bytes_per_s=hbm_tb_per_s * _TERA,
        flops={precision: each * _TERA for precision, each in tera.items()},
        nvlink_domain=domain,
        nvlink_bytes_per_s=nvlink_gb_per_s * _GB,
        nic_bytes_per_s=nic_gb_per_s * _GB,
        pcie_bytes_per_s=pcie_gb_per_s * _GB,
        gpus_per_node=per_node,
        host_memory_bytes=host_gib * _GIB,
        sms=sms,
        launch_s=launch_s,
        source=source,
    )


_HOPPER = {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "fp8": 1978.9, "int8": 1978.9}
_B200 = {"fp32": 75.0, "tf32": 1125.0, "bf16": 2250.0, "fp16": 2250.0, "fp8": 4500.0, "mxfp8": 4500.0, "nvfp4": 9000.0}
_B300 = {"fp32": 75.0, "tf32": 1125.0, "bf16": 2250.0, "fp16": 2250.0, "fp8": 4500.0, "mxfp8": 4500.0, "nvfp4": 13500.0}
_GB200 = {
    "fp32": 80.0,
    "tf32": 1250.0,
    "bf16": 2500.0,
    "fp16": 2500.0,
    "fp8": 5000.0,
    "mxfp8": 5000.0,
    "nvfp4": 10000.0,
}
_GB300 = {
    "fp32": 80.0,
    "tf32": 1250.0,
    "bf16": 2500.0,
    "fp16": 2500.0,
    "fp8": 5000.0,
    "mxfp8": 5000.0,
    "nvfp4": 15000.0,
}
_CDNA3 = {"fp32": 163.4, "tf32": 653.7, "bf16": 1307.4, "fp16": 1307.4, "fp8": 2614.9, "int8": 2614.9}
_MI350 = {"fp32": 144.2, "bf16": 2306.9, "fp16": 2306.9, "fp8": 4613.7, "mxfp8": 4613.7, "nvfp4": 9227.5}
_MI355 = {"fp32": 157.3, "bf16": 2516.6, "fp16": 2516.6, "fp8": 5033.2, "mxfp8": 5033.2, "nvfp4": 10066.3}

_GPUS: tuple[Gpu, ...] = (
    _nvidia(
        "a100",
        85.9,
        2.039,
        {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0, "int8": 624.0},
        nvlink_gb_per_s=300.0,
        nic_gb_per_s=25.0,
        pcie_gb_per_s=25.0,
        host_gib=2048,
        sms=108,
        source="NVIDIA A100 80GB SXM datasheet; DGX A100: 8 x 200 Gb/s",
    ),
    _nvidia(
        "h100",
        85.9,
        3.35,
        _HOPPER,
        nvlink_gb_per_s=450.0,
        source="NVIDIA H100 SXM datasheet; DGX H100: 8 x 400 Gb/s, 2 TiB host memory",
    ),
    _nvidia(
        "h100-500w",
        103.1,
        2.4,
        _HOPPER,
        nvlink_gb_per_s=450.0,
        source="Meta Grand Teton: H100 with 96 GB HBM2e at 2.4 TB/s, capped at 500 W (torchtitan benchmarks, 2024-12)",
    ),
    _nvidia(
        "h800",
        85.9,
        3.35,
        _HOPPER,
        nvlink_gb_per_s=200.0,
        source="NVIDIA H800: H100 SXM with 400 GB/s NVLink (arXiv 2412.19437 section 3.1)",
    ),
    _nvidia(
        "h200",
        151.4,
        4.8,
        _HOPPER,
        nvlink_gb_per_s=450.0,
        source="NVIDIA H200 SXM datasheet; memory as the driver reports it",
    ),
    _nvidia(
        "h20",
        102.6,
        4.0,
        {"fp32": 44.0, "tf32": 74.0, "bf16": 148.0, "fp16": 148.0, "fp8": 296.0, "int8": 296.0},
        nvlink_gb_per_s=450.0,
        sms=78,
        source="NVIDIA H20 96GB product brief",
    ),
    _nvidia("b200", 192.0, 8.0, _B200, nvlink_gb_per_s=900.0, sms=148, source="NVIDIA DGX B200 datasheet, per GPU"),
    _nvidia(
        "b300",
        288.0,
        8.0,
        _B300,
        nvlink_gb_per_s=900.0,
        nic_gb_per_s=100.0,
        sms=148,
        source="NVIDIA DGX B300 datasheet, per GPU; 8 x 800 Gb/s",
    ),
    _nvidia(
        "gb200",
        198.0,
        8.0,
        _GB200,
        nvlink_gb_per_s=900.0,
        domain=72,
        pcie_gb_per_s=200.0,
        per_node=4,
        host_gib=960,
        sms=152,
        source="NVIDIA GB200 NVL72 datasheet, per GPU; NVLink-C2C 450 GB/s shared by two GPUs",
    ),
    _nvidia(
        "gb300",
        288.0,
        8.0,
        _GB300,
        nvlink_gb_per_s=900.0,
        domain=72,
        nic_gb_per_s=100.0,
        pcie_gb_per_s=200.0,
        per_node=4,
        host_gib=960,
        sms=152,
        source="NVIDIA GB300 NVL72 datasheet, per GPU",
    ),
    _nvidia(
        "gh200",
        102.6,
        4.0,
        _HOPPER,
        nvlink_gb_per_s=450.0,
        domain=1,
        pcie_gb_per_s=350.0,
        per_node=1,
        host_gib=480,
        source="NVIDIA GH200 datasheet",
    ),
    _nvidia(
        "gb10",
        128.0,
        0.273,
        {"fp32": 31.0, "tf32": 62.5, "bf16": 125.0, "fp16": 125.0, "fp8": 250.0, "mxfp8": 250.0, "nvfp4": 500.0},
        nvlink_gb_per_s=25.0,
        domain=1,
        nic_gb_per_s=25.0,
        pcie_gb_per_s=100.0,
        per_node=1,
        host_gib=119,
        sms=48,
        source="NVIDIA DGX Spark datasheet (1 PFLOP of sparse FP4, 273 GB/s); one memory for host and GPU, so what one holds "
        "the other lacks",
    ),
    _nvidia(
        "mi300x",
        206.1,
        5.3,
        _CDNA3,
        nvlink_gb_per_s=448.0,
        sms=304,
        launch_s=6.0e-6,
        vendor="amd",
        source="AMD Instinct MI300X datasheet; 7 x 64 GB/s Infinity Fabric",
    ),
    _nvidia(
        "mi325x",
        274.9,
        6.0,
        _CDNA3,
        nvlink_gb_per_s=448.0,
        sms=304,
        launch_s=6.0e-6,
        vendor="amd",
        source="AMD Instinct MI325X datasheet",
    ),
    _nvidia(
        "mi350x",
        309.2,
        8.0,
        _MI350,
        nvlink_gb_per_s=538.0,
        sms=256,
        launch_s=6.0e-6,
        vendor="amd",
        source="AMD Instinct MI350X datasheet; 7 x 76.8 GB/s Infinity Fabric",
    ),
    _nvidia(
        "mi355x",
        309.2,
        8.0,
        _MI355,
        nvlink_gb_per_s=538.0,
        sms=256,
        launch_s=6.0e-6,
        vendor="amd",
        source="AMD Instinct MI355X datasheet",
    ),
    Gpu(
        name="cpu",
        vendor="cpu",
        memory_bytes=4 * _GIB,
        usable_bytes=4 * _GIB,
        hbm_bytes_per_s=25.0e9,
        flops={"fp32": 90.0e9, "bf16": 90.0e9, "fp16": 5.0e9},
        nvlink_domain=8,
        nvlink_bytes_per_s=2.0e9,
        nic_bytes_per_s=1.0e9,
        pcie_bytes_per_s=5.0e9,
        gpus_per_node=8,
        host_memory_bytes=8 * _GIB,
        sms=1,
        launch_s=1.0e-4,
        source="one process of the embedded engines on a laptop core, as the quickstart runs there; launch_s is Python and a "
        "few small torch ops for what a GPU does in one kernel",
    ),
)
_ALIASES = {"h100-80gb": "h100", "h200-141gb": "h200", "a100-80gb": "a100", "h20-96gb": "h20", "dgx-spark": "gb10"}


def gpu_names() -> tuple[str, ...]:
    """Canonical names in catalog order."""
    return tuple(gpu.name for gpu in _GPUS)


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`, in any case.

    Raises:
        ValueError: no such GPU; the message names the nearest ones.
    """
    wanted = name.lower()
    wanted = _ALIASES.get(wanted, wanted)
    for gpu in _GPUS:
        if gpu.name == wanted:
            return gpu
    near = difflib.get_close_matches(wanted, gpu_names(), n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else f"; known: {', '.join(gpu_names())}"
    raise ValueError(f"no GPU called {name!r}{hint}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGroup:
    """Identical nodes. host_memory_bytes 0 takes the GPU's usual machine; rdma: the nodes reach others by RDMA."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    host_memory_bytes: int = 0
    rdma: bool = True

    @property
    def num_gpus(self) -> int:
        """GPUs of the group."""
        return self.nodes * self.gpus_per_node

    @property
    def node_memory_bytes(self) -> int:
        """Host memory of one node."""
        return self.host_memory_bytes or self.gpu.host_memory_bytes


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes in order, groups of identical ones one after another; more than one group is a heterogeneous cluster."""

    groups: tuple[NodeGroup, ...]

    def __post_init__(self) -> None:
        if not self.groups or any(group.nodes < 1 or group.gpus_per_node < 1 for group in self.groups):
            raise ValueError("a cluster needs at least one node with one GPU in every group")

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(group.num_gpus for group in self.groups)

    @property
    def num_nodes(self) -> int:
        """Nodes of all groups."""
        return sum(group.nodes for group in self.groups)

    @property
    def gpus_per_node(self) -> int:
        """GPUs of the smallest node."""
        return min(group.gpus_per_node for group in self.groups)

    @property
    def homogeneous(self) -> bool:
        """Whether every node has the same GPUs."""
        return len({(group.gpu.name, group.gpus_per_node) for group in self.groups}) == 1

    def nodes(self) -> Iterator[NodeGroup]:
        """The group of every node, in node order."""
        for group in self.groups:
            for _ in range(group.nodes):
                yield group

    def node(self, index: int) -> NodeGroup:
        """The group the node with this index belongs to.

        Raises:
            ValueError: the cluster has no such node.
        """
        for at, group in enumerate(self.nodes()):
            if at == index:
                return group
        raise ValueError(f"no node {index} in a cluster of {self.num_nodes}")

    def gpu_at(self, node: int) -> Gpu:
        """The kind of GPU in one node."""
        return self.node(node).gpu


def cluster_of(gpu: str | Gpu, nodes: int, gpus_per_node: int = 0, host_memory_bytes: int = 0, rdma: bool = True) -> Cluster:
    """A homogeneous cluster; 0 takes what the GPU's usual machine has."""
    kind = find_gpu(gpu) if isinstance(gpu, str) else gpu
    group = NodeGroup(
        gpu=kind,
        nodes=nodes,
        gpus_per_node=gpus_per_node or kind.gpus_per_node,
        host_memory_bytes=host_memory_bytes,
        rdma=rdma,
    )
    return Cluster((group,))
