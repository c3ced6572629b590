from __future__ import annotations

import pytest

from miles_plan.calibrate.gpu_kind import gpu_kind


@pytest.mark.parametrize(
    ("device", "memory_gb", "name"),
    [
        ("NVIDIA H200", 150.1, "h200"),
        ("NVIDIA H100 80GB HBM3", 85.0, "h100"),
        ("NVIDIA H100", 101.0, "h100-500w"),
        ("NVIDIA A100-SXM4-80GB", 85.1, "a100"),
        ("NVIDIA H20", 101.6, "h20"),
        ("NVIDIA GH200 96GB HBM3", 101.9, "gh200"),
        ("NVIDIA B200", 191.5, "b200"),
        ("AMD Instinct MI300X", 205.8, "mi300x"),
    ],
)
def test_drivers_names_lead_to_the_catalog(device: str, memory_gb: float, name: str) -> None:
    found = gpu_kind(device, int(memory_gb * 1e9))
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    ("device", "memory_gb"),
    [
        ("NVIDIA L40S", 47.7),
        ("NVIDIA H100 PCIe", 85.0),
        ("NVIDIA H200 NVL", 150.0),
        ("NVIDIA A100-SXM4-40GB", 42.4),
        ("NVIDIA H2000", 150.0),
        ("", 0.0),
    ],
)
def test_a_gpu_that_the_catalog_lacks_is_none(device: str, memory_gb: float) -> None:
    assert gpu_kind(device, int(memory_gb * 1e9)) is None
