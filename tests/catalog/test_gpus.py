import pytest

from miles_plan.catalog.gpus import Cluster, NodeGroup, cluster_of, find_gpu, gpu_names

LISTED = (
    "a100",
    "h100",
    "h200",
    "h20",
    "b200",
    "b300",
    "gb200",
    "gb300",
    "gb10",
    "mi300x",
    "mi325x",
    "mi350x",
    "mi355x",
    "cpu",
)


@pytest.mark.parametrize("name", LISTED)
def test_every_listed_gpu_is_there_with_its_source(name: str) -> None:
    gpu = find_gpu(name.upper())
    assert gpu.source
    assert 0 < gpu.usable_bytes <= gpu.memory_bytes
    assert gpu.rate("bf16") > 0
    assert gpu.host_memory_bytes > 0


def test_unknown_gpus_and_precisions_are_refused_with_help() -> None:
    with pytest.raises(ValueError, match="did you mean h100"):
        find_gpu("h10")
    with pytest.raises(ValueError, match="a100 has no fp8 arithmetic"):
        find_gpu("a100").rate("fp8")


def test_a_heterogeneous_cluster_knows_its_nodes() -> None:
    cluster = Cluster(
        (
            NodeGroup(gpu=find_gpu("h100"), nodes=2, gpus_per_node=8),
            NodeGroup(gpu=find_gpu("h20"), nodes=1, gpus_per_node=4, host_memory_bytes=1 << 40),
        )
    )
    assert cluster.num_gpus == 20
    assert [cluster.gpu_at(node).name for node in range(3)] == ["h100", "h100", "h20"]
    assert not cluster.homogeneous
    assert cluster.node(2).node_memory_bytes == 1 << 40
    with pytest.raises(ValueError, match="no node 3"):
        cluster.gpu_at(3)


def test_names_are_unique() -> None:
    assert len(set(gpu_names())) == len(gpu_names())
    assert cluster_of("gb200", 2).gpus_per_node == 4
