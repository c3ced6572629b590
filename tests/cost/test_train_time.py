from dataclasses import replace

import pytest

from miles_plan.catalog.gpus import cluster_of
from miles_plan.catalog.models import find_model
from miles_plan.cost.layer_time import HYPER_BACKWARD_HOST_S, HYPER_FORWARD_HOST_S, ComputeOptions
from miles_plan.cost.train_options import OptimizerOptions, TrainMemoryOptions
from miles_plan.cost.train_time import (
    TENSOR_HOST_S,
    TrainTimeOptions,
    TrainWorkload,
    log_prob_time,
    price_train_layouts,
    train_step_time,
    workload_of_lengths,
)
from miles_plan.ir.layout import TrainLayout

WORKLOAD = workload_of_lengths([4096.0] * 256, tokens_per_gpu=8192)
CLUSTER = cluster_of("h200", 1)
FEW = workload_of_lengths([1024.0] * 8, tokens_per_gpu=1024)


def test_an_8b_step_lands_between_the_peak_and_a_quarter_of_it() -> None:
    model = find_model("qwen3-8b")
    step = train_step_time(model, TrainLayout(dp=8), WORKLOAD, CLUSTER)
    ideal = 6 * model.params_active * WORKLOAD.total_tokens / (8 * 989e12)
    assert ideal < step.mid < 4 * ideal
    assert sum(term.value for term in step.terms) == pytest.approx(step.mid)
    assert step.low < step.mid < step.high


def test_a_log_prob_pass_costs_about_a_third() -> None:
    model, layout = find_model("qwen3-8b"), TrainLayout(tp=2, dp=4, sequence_parallel=True)
    step = train_step_time(model, layout, WORKLOAD, CLUSTER)
    assert 0.25 < log_prob_time(model, layout, WORKLOAD, CLUSTER).mid / step.mid < 0.4


def test_full_recomputation_adds_a_forward() -> None:
    model, layout = find_model("qwen3-8b"), TrainLayout(dp=8)
    plain = train_step_time(model, layout, WORKLOAD, CLUSTER)
    again = train_step_time(model, layout, WORKLOAD, CLUSTER, TrainTimeOptions(recompute="full"))
    assert 1.2 < again.mid / plain.mid < 1.4


def test_a_pipeline_waits_in_its_bubble_and_offload_for_the_host() -> None:
    model = find_model("qwen3-8b")
    piped = train_step_time(model, TrainLayout(pp=4, dp=2), WORKLOAD, CLUSTER)
    assert piped.term("bubble") > 0
    offload = TrainTimeOptions(optimizer=OptimizerOptions(offload_fraction=1.0))
    slow = train_step_time(model, TrainLayout(dp=8), WORKLOAD, CLUSTER, offload)
    assert slow.term("optimizer") > train_step_time(model, TrainLayout(dp=8), WORKLOAD, CLUSTER).term("optimizer")


def test_pricing_many_layouts_is_pricing_each() -> None:
    model = find_model("qwen3-30b-a3b")
    layouts = [
        TrainLayout(tp=tp, pp=pp, dp=8 // (tp * pp), ep=8 // pp, sequence_parallel=tp > 1) for tp in (1, 2, 4) for pp in (1, 2)
    ]
    prices = price_train_layouts(model, layouts, WORKLOAD, CLUSTER, TrainMemoryOptions(), TrainTimeOptions())
    for at, layout in enumerate(layouts):
        assert prices.step_s[at] == pytest.approx(train_step_time(model, layout, WORKLOAD, CLUSTER).mid)
        assert prices.log_prob_s[at] < prices.step_s[at]


def test_workloads_need_tokens() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        workload_of_lengths([], 8192)
    with pytest.raises(ValueError, match="positive"):
        TrainWorkload(total_tokens=0, sum_squares=1, longest=1, tokens_per_gpu=1)


def test_scores_through_memory_cost_long_sequences_dear() -> None:
    model, layout = find_model("qwen3-8b"), TrainLayout(tp=4, cp=2, sequence_parallel=True)
    long = workload_of_lengths([32768.0] * 8, tokens_per_gpu=16384)
    fused = train_step_time(model, layout, long, CLUSTER)
    unfused = train_step_time(model, layout, long, CLUSTER, TrainTimeOptions(compute=ComputeOptions(fused_attention=False)))
    assert unfused.mid > 4 * fused.mid


def test_prediction_layers_train_along_but_not_in_a_log_prob_pass() -> None:
    model, layout, options = find_model("deepseek-v3"), TrainLayout(dp=8, ep=8), TrainTimeOptions(mtp_layers=1)
    assert (
        train_step_time(model, layout, WORKLOAD, CLUSTER, options).mid > train_step_time(model, layout, WORKLOAD, CLUSTER).mid
    )
    assert log_prob_time(model, layout, WORKLOAD, CLUSTER, options).mid == log_prob_time(model, layout, WORKLOAD, CLUSTER).mid


def test_a_slow_host_shows_unless_graphs_replay_it() -> None:
    model, layout = find_model("qwen3-30b-a3b"), TrainLayout(dp=8, ep=8)
    small = workload_of_lengths([1024.0] * 64, tokens_per_gpu=1024)

    def seconds(host_scale: float, cuda_graphs: float) -> float:
        compute = ComputeOptions(host_scale=host_scale, cuda_graphs=cuda_graphs)
        return train_step_time(model, layout, small, CLUSTER, TrainTimeOptions(compute=compute)).mid

    assert seconds(1.5, 0.0) > 1.2 * seconds(1.0, 0.0)
    assert seconds(1.5, 1.0) == seconds(1.0, 1.0)


def test_an_optimizer_step_loops_over_its_weights_unless_it_reads_them_as_they_are() -> None:
    model, workload = find_model("qwen3-30b-a3b"), FEW
    spread, whole, aware = (
        train_step_time(model, layout, workload, cluster_of("h200", 1), options).term("optimizer")
        for layout, options in (
            (TrainLayout(dp=8, ep=8), TrainTimeOptions()),
            (TrainLayout(dp=8, ep=1), TrainTimeOptions()),
            (TrainLayout(dp=8, ep=1), TrainTimeOptions(optimizer=OptimizerOptions(precision_aware=True))),
        )
    )
    weights = 48 * (8 + 2 * 128)
    assert whole - aware == pytest.approx(weights * TENSOR_HOST_S)
    assert spread < whole


def test_quantising_experts_one_by_one_is_the_hosts_work() -> None:
    model, workload = find_model("qwen3-30b-a3b"), FEW
    hosts = [
        train_step_time(
            model,
            TrainLayout(dp=8, ep=8),
            workload,
            cluster_of("b200", 1),
            TrainTimeOptions(compute=ComputeOptions(precision=precision)),
        ).term("host")
        for precision in ("mxfp8", "fp8")
    ]
    assert hosts[1] > hosts[0]


def test_hyper_connections_cost_the_host_their_launches() -> None:
    model = find_model("deepseek-v4-flash")
    assert all(kind.residual_streams == 4 for kind in model.kinds)
    plain = replace(model, kinds=tuple(replace(kind, residual_streams=1) for kind in model.kinds))
    layout, workload = TrainLayout(dp=64, ep=64), workload_of_lengths([1024.0] * 64, tokens_per_gpu=1024)
    streams, one = (train_step_time(each, layout, workload, cluster_of("gb200", 16)).mid for each in (model, plain))
    assert streams - one > 0.8 * model.num_layers * (HYPER_FORWARD_HOST_S + HYPER_BACKWARD_HOST_S)
