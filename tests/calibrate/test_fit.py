"""Known constants come back from points that follow the cost models' formulas; points that cannot be right are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.calibrate.fit import (
    GROUPED_SHARE,
    REFERENCE_EAGER_LAUNCH_S,
    STREAM_SHARE,
    bus_bytes,
    fit,
    names_of,
)
from miles_plan.calibrate.points import (
    AttentionPoint,
    CollectiveOp,
    CollectivePoint,
    GemmPoint,
    GroupedGemmPoint,
    HostCopyPoint,
    LaunchPoint,
    Measurements,
    MemoryPoint,
    StreamPoint,
)
from miles_plan.catalog.gpus import find_gpu
from miles_plan.cost.layer_time import BACKWARD_ATTENTION_FLOPS, K_RAMP, TILE_M, wave_fraction

GPU = find_gpu("h200")
FLOOR_S, OP_HBM, BF16, FP8, GROUPED, HBM = 4.0e-6, 0.85, 0.7, 0.6, 0.7, 0.86
SHAPES = ((8192, 8192, 8192), (8192, 4096, 14336), (16384, 12288, 2048))


def usable(m: int, n: int, k: int) -> float:
    return float(wave_fraction(m, n, GPU.sms)) * k / (k + K_RAMP)


def product(m: int, n: int, k: int, precision: str, fraction: float) -> GemmPoint:
    seconds = FLOOR_S + 2.0 * m * n * k / (GPU.rate(precision) * fraction * usable(m, n, k))
    return GemmPoint(m=m, n=n, k=k, precision=precision, state="sustained", seconds=seconds, spread=0.01)


def small_product(m: int, n: int, k: int) -> GemmPoint:
    moved, flops = 2.0 * (m * k + n * k + m * n), 2.0 * m * n * k
    seconds = FLOOR_S + moved / (GPU.hbm_bytes_per_s * OP_HBM) + flops / (GPU.rate("bf16") * 0.8)
    return GemmPoint(m=m, n=n, k=k, precision="bf16", state="decode", seconds=seconds)


def experts(count: int, m: int, n: int, k: int) -> GroupedGemmPoint:
    share = m / (m + TILE_M / 2) * usable(count * m, n, k)
    rate = GPU.rate("bf16") * BF16 * GROUPED / GROUPED_SHARE
    return GroupedGemmPoint(experts=count, m=m, n=n, k=k, seconds=FLOOR_S + 2.0 * count * m * n * k / (rate * share))


def attention(phase: str, fraction: float, tokens: int = 4096) -> AttentionPoint:
    shape = {"batch": 2, "tokens": tokens, "heads": 32, "kv_heads": 8, "head_dim": 128}
    work = BACKWARD_ATTENTION_FLOPS if phase == "backward" else 1.0
    flops = work * 4.0 * 32 * 128 * 2 * tokens * (tokens + 1) / 2
    return AttentionPoint(phase=phase, backend="flash", seconds=flops / (GPU.rate("bf16") * fraction), **shape)  # type: ignore[arg-type]


def decode(batch: int, tokens: int) -> AttentionPoint:
    moved = 4.0 * batch * 8 * tokens * 128
    seconds = 1.1e-5 + moved / (GPU.hbm_bytes_per_s * 0.88)
    shape = {"batch": batch, "tokens": tokens, "heads": 32, "kv_heads": 8, "head_dim": 128}
    return AttentionPoint(phase="decode", backend="cudnn", seconds=seconds, **shape)  # type: ignore[arg-type]


def collective(op: CollectiveOp, fraction: float, size: int) -> CollectivePoint:
    point = CollectivePoint(op=op, ranks=8, size_bytes=size, seconds=1.0)
    return replace(point, seconds=1.8e-5 + bus_bytes(point) / (GPU.nvlink_bytes_per_s * fraction))


def points() -> Measurements:
    return Measurements(
        streams=tuple(
            StreamPoint(kernel=name, moved_bytes=1 << 31, seconds=(1 << 31) * STREAM_SHARE / (GPU.hbm_bytes_per_s * HBM))
            for name in ("copy", "scale", "add")
        ),
        host_copies=(
            HostCopyPoint(direction="pin", size_bytes=1 << 30, seconds=(1 << 30) / 3e9),
            HostCopyPoint(direction="host_to_device", size_bytes=1 << 20, seconds=1e-4),
            HostCopyPoint(direction="host_to_device", size_bytes=1 << 30, seconds=(1 << 30) / 55e9),
            HostCopyPoint(direction="device_to_host", size_bytes=1 << 30, seconds=(1 << 30) / 50e9),
        ),
        gemms=(
            *(product(*each, "bf16", BF16) for each in SHAPES),
            *(product(*each, "fp8", FP8) for each in SHAPES),
            *(small_product(m, n, k) for n, k in ((2048, 2048), (28672, 4096)) for m in (1, 16, 64, 256)),
        ),
        grouped_gemms=(experts(16, 1024, 1536, 2048), experts(8, 4096, 28672, 4096)),
        attention=(attention("forward", 0.6), attention("backward", 0.5), decode(8, 256), decode(64, 2048), decode(128, 4096)),
        launches=(LaunchPoint(way="eager_host", seconds=2 * REFERENCE_EAGER_LAUNCH_S),),
        collectives=tuple(
            collective(op, 0.7, size) for op in ("all_reduce", "all_gather", "p2p") for size in (1 << 20, 1 << 28, 1 << 30)
        ),
        memory=(MemoryPoint(what="context", size_bytes=650_000_000),),
    )


def test_known_constants_come_back() -> None:
    found = fit(GPU, points())
    assert found.problems == ()
    constants = found.constants
    assert constants["gemm_fraction"] == {"bf16": pytest.approx(BF16, rel=1e-3), "fp8": pytest.approx(FP8, rel=1e-3)}
    assert constants["grouped_gemm_fraction"] == pytest.approx(GROUPED, rel=1e-3)
    assert constants["hbm_fraction"] == pytest.approx(HBM, rel=1e-3)
    assert constants["attention_forward_fraction"] == pytest.approx(0.6, rel=1e-3)
    assert constants["attention_backward_fraction"] == pytest.approx(0.5, rel=1e-3)
    assert constants["kernel_launch_s"] == pytest.approx(FLOOR_S, rel=1e-2)
    assert constants["host_scale"] == pytest.approx(2.0)
    assert constants["host_to_device_bytes_per_s"] == pytest.approx(55e9, rel=1e-3)
    assert constants["pin_bytes_per_s"] == pytest.approx(3e9, rel=1e-3)
    assert constants["context_bytes"] == 650e6
    assert constants["nvlink_bus_fraction"] == {op: pytest.approx(0.7, rel=0.02) for op in ("all_reduce", "all_gather", "p2p")}
    assert constants["nvlink_latency_s"] == pytest.approx(1.8e-5, rel=0.02)
    ops = constants["decode_ops"]
    assert ops["product_bf16"] == {
        "floor_s": pytest.approx(FLOOR_S, rel=1e-2),
        "hbm_fraction": pytest.approx(OP_HBM, rel=1e-2),
        "peak_fraction": pytest.approx(0.8, rel=1e-2),
    }
    assert ops["attention"]["floor_s"] == pytest.approx(1.1e-5, rel=1e-2)
    assert ops["attention"]["hbm_fraction"] == pytest.approx(0.88, rel=1e-2)


@settings(max_examples=25, deadline=None)
@given(fraction=st.floats(0.1, 1.0), scale=st.floats(0.9, 1.1))
def test_the_reached_rate_is_what_the_products_took(fraction: float, scale: float) -> None:
    """Whatever the fraction, and with points that disagree by a few percent, the median is the figure."""
    gemms = (
        product(*SHAPES[0], "bf16", fraction),
        product(*SHAPES[1], "bf16", fraction * scale),
        product(*SHAPES[2], "bf16", fraction / scale),
    )
    found = fit(GPU, Measurements(gemms=gemms))
    assert found.constants["gemm_fraction"]["bf16"] == pytest.approx(fraction, rel=0.01)


def test_what_was_not_measured_is_not_a_constant() -> None:
    found = fit(GPU, Measurements(memory=(MemoryPoint(what="context", size_bytes=600_000_000),)))
    assert list(names_of(found.constants)) == ["context_bytes"]
    assert fit(GPU, Measurements()).constants == {}


def test_byte_bound_products_say_nothing_about_the_rate() -> None:
    thin = replace(product(8192, 8192, 8192, "bf16", BF16), k=64)
    assert "gemm_fraction" not in fit(GPU, Measurements(gemms=(thin,))).constants


def test_names_are_dotted_where_a_profile_nests() -> None:
    names = list(names_of(fit(GPU, points()).constants))
    assert {"gemm_fraction.bf16", "decode_ops.attention", "nvlink_bus_fraction.p2p", "hbm_fraction"} <= set(names)


def test_a_cool_chip_and_small_products_do_not_set_the_rate() -> None:
    hot = points().gemms
    cool = tuple(replace(product(*each, "bf16", 0.95), state="burst") for each in SHAPES * 2)
    thick = tuple(replace(product(*each, "bf16", 0.3), state="decode") for each in SHAPES)
    for others in (cool, thick):
        constants = fit(GPU, Measurements(gemms=(*others, *hot))).constants
        assert constants["gemm_fraction"]["bf16"] == pytest.approx(BF16, rel=0.01)


def test_two_gpus_stand_for_a_link_but_not_for_a_node() -> None:
    pair = tuple(replace(each, ranks=2) for each in points().collectives)
    constants = fit(GPU, Measurements(collectives=pair)).constants
    assert list(constants["nvlink_bus_fraction"]) == ["p2p"]
    assert "nvlink_latency_s" not in constants


def test_scattered_repetitions_are_refused() -> None:
    noisy = replace(points(), gemms=tuple(replace(each, spread=0.6) for each in points().gemms))
    assert any("matrix products: repetitions differ by 60%" in problem for problem in fit(GPU, noisy).problems)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"streams": (StreamPoint(kernel="copy", moved_bytes=1 << 31, seconds=1e-6),)}, "hbm_fraction"),
        ({"gemms": tuple(product(*each, "bf16", 1.8) for each in SHAPES)}, "gemm_fraction.bf16"),
        ({"memory": (MemoryPoint(what="context", size_bytes=-5),)}, "context_bytes"),
        ({"host_copies": (HostCopyPoint(direction="pin", size_bytes=1 << 30, seconds=60.0),)}, "pin_bytes_per_s"),
        ({"collectives": (collective("all_reduce", 0.001, 1 << 30),)}, "nvlink_bus_fraction.all_reduce"),
        ({"launches": (LaunchPoint(way="eager_host", seconds=1.0),)}, "host_scale"),
    ],
)
def test_what_no_machine_gives_is_refused(change: dict[str, object], named: str) -> None:
    found = fit(GPU, replace(points(), **change))  # type: ignore[arg-type]
    assert [problem for problem in found.problems if problem.startswith(f"{named} =")]


def test_seconds_that_follow_no_line_are_refused() -> None:
    small = [small_product(m, 28672, 4096) for m in (1, 16, 64, 256)] + [small_product(m, 2048, 2048) for m in (1, 16, 64, 256)]
    wild = tuple(replace(each, seconds=each.seconds * (20.0 if at % 2 else 1.0)) for at, each in enumerate(small))
    assert any("lie more than" in problem for problem in fit(GPU, Measurements(gemms=wild)).problems)


def test_seconds_that_do_not_grow_with_bytes_are_refused() -> None:
    flat = tuple(replace(decode(batch, 2048), seconds=1e-3) for batch in (8, 64, 128))
    assert any("do not grow" in problem for problem in fit(GPU, Measurements(attention=flat)).problems)
