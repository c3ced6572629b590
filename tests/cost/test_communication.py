import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.catalog.gpus import cluster_of
from miles_plan.catalog.models import find_model
from miles_plan.cost.communication import Collective, collective_s, links_of, ranks_in_domain
from miles_plan.cost.weight_sync import TRANSPORTS, Transport, checkpoint_time, offload_time, weight_sync_time
from miles_plan.ir.layout import RolloutLayout, TrainLayout

LINKS = links_of(cluster_of("h200", 4))
OPS: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")

# Seconds on four H200 of one NVLink domain, NCCL 2.28.9, buffers of 1 GiB and 256 MiB.
MEASURED: list[tuple[Collective, int, float]] = [
    ("all_reduce", 1 << 30, 0.004559),
    ("all_gather", 1 << 30, 0.002471),
    ("reduce_scatter", 1 << 30, 0.002510),
    ("all_to_all", 1 << 30, 0.002400),
    ("all_reduce", 1 << 28, 0.001184),
]


@pytest.mark.parametrize(("op", "size", "seconds"), MEASURED)
def test_large_collectives_take_what_was_measured(op: Collective, size: int, seconds: float) -> None:
    assert float(collective_s(op, size, 4, 4, LINKS)) == pytest.approx(seconds, rel=0.06)


@given(op=st.sampled_from(OPS), size=st.floats(1, 1e10), ranks=st.sampled_from([2, 4, 8, 16, 64]))
def test_leaving_the_domain_never_helps(op: Collective, size: float, ranks: int) -> None:
    inside = collective_s(op, size, ranks, ranks, LINKS)
    assert collective_s(op, size, ranks, max(1, ranks // 8), LINKS) >= inside


def test_a_single_rank_has_nothing_to_do() -> None:
    assert all(float(collective_s(op, 1e9, 1, 1, LINKS)) == 0 for op in OPS)


def test_strided_groups_share_a_domain_with_fewer_ranks() -> None:
    assert float(ranks_in_domain(8, 1, 8)) == 8
    assert float(ranks_in_domain(8, 4, 8)) == 2
    assert float(ranks_in_domain(8, 16, 8)) == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_transport_is_priced(transport: Transport) -> None:
    small, large = (
        weight_sync_time(
            find_model(name),
            TrainLayout(tp=4, ep=8, dp=4, sequence_parallel=True),
            RolloutLayout(engines=2, tp=8),
            transport,
            cluster_of("h100", 4),
        )
        for name in ("qwen3-30b-a3b", "qwen3-235b-a22b")
    )
    assert 0 < small.mid < large.mid
    assert sum(term.value for term in large.terms) == pytest.approx(large.mid)


def test_offload_runs_at_the_link_and_checkpoints_at_the_disk() -> None:
    cluster = cluster_of("h200", 2)
    assert offload_time(52e9, cluster).mid == pytest.approx(1.1, rel=0.1)
    assert checkpoint_time(40e9, cluster, 2e9).mid == pytest.approx(10.0)
