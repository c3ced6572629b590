import pytest

from miles_plan.catalog.gpus import find_gpu
from miles_plan.catalog.models import find_model
from miles_plan.cost.layer_time import ComputeOptions
from miles_plan.cost.software_release import Release, release_compute


def test_no_release_is_megatron_core_as_measured() -> None:
    plain = release_compute("auto", "bf16", find_model("qwen3-30b-a3b"), find_gpu("h100"))
    assert plain == ComputeOptions(precision="bf16")


@pytest.mark.parametrize(
    ("release", "gpu", "graphs", "fused"),
    [
        ("26.02", "h100", 0.3, False),
        ("26.02", "gb200", 0.7, False),
        ("26.04", "h100", 0.7, False),
        ("26.06", "gb200", 1.0, True),
    ],
)
def test_later_releases_replay_more_and_fuse_experts(release: Release, gpu: str, graphs: float, fused: bool) -> None:
    found = release_compute(release, "mxfp8", find_model("qwen3-30b-a3b"), find_gpu(gpu))
    assert (found.cuda_graphs, found.fused_experts) == (graphs, fused)


def test_dense_models_were_graphed_whole_from_the_start() -> None:
    assert release_compute("26.02", "bf16", find_model("qwen3-8b"), find_gpu("h100")).cuda_graphs == 1.0
