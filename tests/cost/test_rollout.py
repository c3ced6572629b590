from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.catalog.gpus import find_gpu
from miles_plan.catalog.models import find_model
from miles_plan.cost.decode_time import Speculation, decode_time_per_token
from miles_plan.cost.lengths import fit_lengths, fixed_length, load_lengths
from miles_plan.cost.rollout_memory import RolloutMemoryOptions, rollout_memory
from miles_plan.cost.rollout_shard import rollout_shard
from miles_plan.cost.rollout_time import RolloutWorkload, simulate_rollout
from miles_plan.ir.layout import RolloutLayout

H200 = find_gpu("h200")
QWEN3 = find_model("qwen3-8b")


@pytest.mark.parametrize(
    ("name", "layout", "bytes_per_token"),
    [
        ("qwen3-8b", RolloutLayout(tp=2), 2 * 36 * 4 * 128 * 2),
        ("qwen3-30b-a3b", RolloutLayout(tp=8), 2 * 48 * 1 * 128 * 2),
        ("deepseek-v3", RolloutLayout(tp=8), 61 * 576 * 2),
        ("qwen3.5-27b", RolloutLayout(tp=1), 2 * 16 * 4 * 256 * 2),
    ],
)
def test_cache_bytes_a_token(name: str, layout: RolloutLayout, bytes_per_token: int) -> None:
    assert rollout_shard(find_model(name), layout).kv_bytes_per_token == bytes_per_token


def test_linear_layers_keep_a_state_a_request() -> None:
    shard = rollout_shard(find_model("qwen3.5-27b"), RolloutLayout(tp=1))
    assert shard.state_bytes_per_request == pytest.approx(151e6 + 48 * (2 * 2048 + 6144) * 3 * 4, rel=0.01)


def test_the_pool_is_what_the_static_share_leaves() -> None:
    memory = rollout_memory(QWEN3, RolloutLayout(tp=1), RolloutMemoryOptions(mem_fraction_static=0.8), H200)
    assert memory.fits
    free = H200.usable_bytes - memory.outside_bytes
    assert memory.pool_bytes + memory.weight_bytes == pytest.approx(0.8 * free)
    assert memory.pool_tokens == int(memory.pool_bytes / memory.kv_bytes_per_token)


def test_an_engine_too_small_for_its_weights_does_not_start() -> None:
    assert not rollout_memory(find_model("deepseek-v3"), RolloutLayout(tp=4), RolloutMemoryOptions(), H200).fits
    greedy = RolloutMemoryOptions(mem_fraction_static=0.995)
    assert rollout_memory(QWEN3, RolloutLayout(tp=1), greedy, H200).headroom_bytes < 0


def test_decoding_is_slower_with_longer_contexts_and_bigger_batches() -> None:
    small, long, wide = (
        decode_time_per_token(QWEN3, RolloutLayout(tp=1), batch, context, H200).mid
        for batch, context in ((1, 1000), (1, 100_000), (128, 1000))
    )
    assert small < long
    assert small < wide
    assert 16.4e9 / 4.8e12 < small < 0.02


def test_speculation_divides_the_step_by_what_is_accepted() -> None:
    plain = decode_time_per_token(QWEN3, RolloutLayout(tp=1), 1, 4000, H200).mid
    draft = Speculation(accept_length=3.0, draft_tokens=4, draft_cost=0.1)
    assert plain / 3.5 < decode_time_per_token(QWEN3, RolloutLayout(tp=1), 1, 4000, H200, speculation=draft).mid < plain
    with pytest.raises(ValueError, match="accept_length"):
        Speculation(accept_length=9.0, draft_tokens=2)


def test_a_fitted_distribution_has_the_figures_it_was_fitted_to() -> None:
    lengths = fit_lengths(8192, 3500, 8000)
    assert lengths.mean_tokens == pytest.approx(3500, rel=1e-3)
    assert lengths.quantile(0.99) == pytest.approx(8000, rel=0.01)
    assert lengths.max_tokens <= 8192


@given(cap=st.floats(16, 1e6), mean_share=st.floats(0.01, 0.95))
@settings(max_examples=30, deadline=None)
def test_every_possible_mean_is_met(cap: float, mean_share: float) -> None:
    mean = max(4.0, cap * mean_share)
    lengths = fit_lengths(cap, mean)
    assert lengths.mean_tokens == pytest.approx(mean, rel=0.02)
    assert max(lengths.table) <= cap * (1 + 1e-12)


def test_contradicting_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="mean 9000"):
        fit_lengths(8192, 9000)
    with pytest.raises(ValueError, match="p99 100"):
        fit_lengths(8192, 3500, 100)


def test_lengths_come_from_files(tmp_path: Path) -> None:
    listed, counted, plain = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.txt"
    listed.write_text('{"lengths": [100, 200, 300]}')
    counted.write_text('{"edges": [0, 200, 400], "counts": [1, 1]}')
    plain.write_text("100\n300\n")
    assert load_lengths(listed).max_tokens == 300
    assert load_lengths(counted).mean_tokens == pytest.approx(200, rel=0.02)
    assert load_lengths(plain).mean_tokens == pytest.approx(200, rel=0.02)
    plain.write_text("-1")
    with pytest.raises(ValueError, match="positive"):
        load_lengths(plain)


def workload(prompts: int, mean: float = 3500) -> RolloutWorkload:
    return RolloutWorkload(prompts=prompts, samples_per_prompt=8, prompt_tokens=500, responses=fit_lengths(8192, mean, 8000))


def test_one_request_takes_its_length_in_steps() -> None:
    one = RolloutWorkload(prompts=1, samples_per_prompt=1, prompt_tokens=100, responses=fixed_length(1000))
    run = simulate_rollout(QWEN3, RolloutLayout(tp=1), one, H200, 1_000_000)
    step = decode_time_per_token(QWEN3, RolloutLayout(tp=1), 1, 600, H200).mid
    assert run.decode_s == pytest.approx(1000 * step, rel=0.02)


def test_more_engines_help_only_until_the_tail() -> None:
    few, many, all_of_them = (
        simulate_rollout(QWEN3, RolloutLayout(engines=engines), workload(256), H200, 900_000).makespan.mid
        for engines in (1, 8, 64)
    )
    assert few > 2 * many
    assert all_of_them > many / 4  # the longest response decodes alone at its own pace


def test_a_small_pool_retracts_and_is_slower() -> None:
    roomy = simulate_rollout(QWEN3, RolloutLayout(), workload(64), H200, 10_000_000)
    tight = simulate_rollout(QWEN3, RolloutLayout(), workload(64), H200, 100_000)
    assert roomy.retractions == 0
    assert tight.retractions > 0
    assert tight.makespan.mid > roomy.makespan.mid


def test_a_pool_that_cannot_hold_one_request_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold one request"):
        simulate_rollout(QWEN3, RolloutLayout(), workload(1), H200, 1000)


@settings(max_examples=15, deadline=None)
@given(prompts=st.integers(1, 64), pool=st.integers(20_000, 2_000_000), slots=st.integers(1, 300))
def test_a_simulation_generates_every_token(prompts: int, pool: int, slots: int) -> None:
    run = simulate_rollout(QWEN3, RolloutLayout(), workload(prompts), H200, pool, slots)
    admission_s = next(term.value for term in run.makespan.terms if term.name == "admission")
    assert run.makespan.mid == pytest.approx(admission_s + run.prefill_s + run.decode_s)
    assert run.mean_batch <= slots + 1e-6
    assert run.tokens_per_s_per_gpu > 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1",
        "nan",
        "{" * 5000,
        '{"lengths": []}',
        '{"lengths": ["x"]}',
        '{"edges": 1, "counts": 2}',
        '{"edges": [1, 2], "counts": [-1]}',
    ],
)
def test_a_hostile_file_of_lengths_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "lengths.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"lengths\.json"):
        load_lengths(file)
    with pytest.raises(ValueError, match="not a file of lengths"):
        load_lengths(tmp_path / "absent.json")


def test_counts_may_be_of_billions(tmp_path: Path) -> None:
    file = tmp_path / "lengths.json"
    file.write_text('{"edges": [0, 2, 4], "counts": [3e12, 1e12]}')
    found = load_lengths(file)
    assert found.mean_tokens == pytest.approx(1.5, rel=0.2)
    assert found.cut(2.0).max_tokens == 2.0
