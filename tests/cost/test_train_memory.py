from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.catalog.models import find_model
from miles_plan.cost.train_memory import train_memory, train_memory_columns
from miles_plan.cost.train_options import OptimizerOptions, TrainMemoryOptions
from miles_plan.ir.layout import TrainLayout

# Peak bytes of the caching allocator on H200, Megatron-core 0.19.2, Transformer Engine 2.13, Qwen3-8B shapes.
MEASURED = [
    (TrainLayout(tp=4, sequence_parallel=True), TrainMemoryOptions(tokens_per_gpu=8192), 49_485_767_168),
    (TrainLayout(pp=4), TrainMemoryOptions(tokens_per_gpu=4096, num_microbatches=8), 63_461_783_040),
]


@pytest.mark.parametrize(("layout", "options", "peak"), MEASURED)
def test_peak_is_the_measured_one(layout: TrainLayout, options: TrainMemoryOptions, peak: int) -> None:
    memory = train_memory(find_model("qwen3-8b"), layout, options)
    assert memory.peak_bytes.mid == pytest.approx(peak, rel=0.015)
    assert memory.peak_bytes.holds(peak)


def test_terms_sum_to_the_peak() -> None:
    memory = train_memory(
        find_model("qwen3-30b-a3b"), TrainLayout(tp=2, ep=4, dp=4, sequence_parallel=True), TrainMemoryOptions()
    )
    assert sum(term.value for term in memory.terms) == pytest.approx(memory.peak_bytes.mid)
    assert memory.device_bytes.mid > memory.peak_bytes.mid


def test_offload_moves_optimizer_state_to_the_host() -> None:
    layout, model = TrainLayout(tp=2, dp=4, sequence_parallel=True), find_model("qwen3-8b")
    kept = train_memory(model, layout, TrainMemoryOptions())
    moved = train_memory(model, layout, TrainMemoryOptions(optimizer=OptimizerOptions(offload_fraction=1.0)))
    assert kept.peak_bytes.mid - moved.peak_bytes.mid == pytest.approx(moved.host_bytes)
    assert kept.host_bytes == 0


def test_recomputing_a_layer_saves_memory_and_modules_save_less() -> None:
    layout, model = TrainLayout(dp=8), find_model("qwen3-8b")
    none, mlp, full = (
        train_memory(model, layout, TrainMemoryOptions(tokens_per_gpu=32768, recompute=how, recompute_modules=modules))
        for how, modules in (("none", frozenset()), ("selective", frozenset({"mlp"})), ("full", frozenset()))
    )
    assert none.peak_bytes.mid > mlp.peak_bytes.mid > full.peak_bytes.mid


def test_the_first_stage_of_a_deep_pipeline_is_the_fullest() -> None:
    options = TrainMemoryOptions(num_microbatches=32, tokens_per_gpu=16384)
    assert train_memory(find_model("qwen3-32b"), TrainLayout(pp=8), options).stage == 0


def test_uneven_stages_must_add_up() -> None:
    with pytest.raises(ValueError, match="stage_layers add up to 35, the model has 36"):
        train_memory(find_model("qwen3-8b"), TrainLayout(pp=2, stage_layers=(17, 18)), TrainMemoryOptions())


def test_the_torch_engine_pays_for_whole_attention_scores() -> None:
    model = find_model("qwen2.5-0.5b")
    short = TrainMemoryOptions(engine="torch", precision="fp32", tokens_per_gpu=512, seq_len=512)
    terms = {term.name: term.value for term in train_memory(model, TrainLayout(), short).terms}
    assert terms["attention scores"] == 12 * 512 * 512 * 14 * 24
    assert terms["parameters"] == model.params_total * 4


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="offload_fraction"):
        TrainMemoryOptions(optimizer=OptimizerOptions(offload_fraction=1.5))
    with pytest.raises(ValueError, match="at least 1"):
        TrainMemoryOptions(tokens_per_gpu=0)


LAYOUTS = st.builds(
    lambda tp, pp, cp, dp, ep: TrainLayout(tp=tp, pp=pp, cp=cp, dp=dp, ep=min(ep, tp * cp * dp), sequence_parallel=tp > 1),
    *[st.sampled_from([1, 2, 4, 8])] * 5,
)


@settings(max_examples=40, deadline=None)
@given(layouts=st.lists(LAYOUTS, min_size=1, max_size=12), tokens=st.integers(1, 65536))
def test_pricing_many_layouts_is_pricing_each(layouts: list[TrainLayout], tokens: int) -> None:
    model, options = find_model("qwen3-30b-a3b"), TrainMemoryOptions(tokens_per_gpu=tokens, num_microbatches=4)
    together = train_memory_columns(model, layouts, options)
    for at, layout in enumerate(layouts):
        alone = train_memory(model, layout, options)
        assert together.peak_bytes[at] == pytest.approx(alone.peak_bytes.mid)
        assert together.static_bytes[at] <= together.peak_bytes[at]


@settings(max_examples=40, deadline=None)
@given(layout=LAYOUTS, tokens=st.integers(1, 30000))
def test_more_tokens_never_need_less(layout: TrainLayout, tokens: int) -> None:
    model = find_model("qwen3-30b-a3b")
    small, large = (train_memory(model, layout, TrainMemoryOptions(tokens_per_gpu=count)) for count in (tokens, 2 * tokens))
    assert small.peak_bytes.mid <= large.peak_bytes.mid


def held(options: TrainMemoryOptions, layout: TrainLayout | None = None, name: str = "qwen3-8b") -> dict[str, float]:
    found = train_memory(find_model(name), layout or TrainLayout(tp=2, dp=4, sequence_parallel=True), options)
    return {term.name: term.value for term in found.terms}


def test_primary_fp8_weights_replace_the_wide_ones() -> None:
    copies = held(TrainMemoryOptions(precision="fp8"))
    primary = held(TrainMemoryOptions(precision="fp8", primary_fp8=True))
    assert copies["fp8 weights"] > 0
    assert "fp8 weights" not in primary


def test_the_master_copy_moves_only_with_a_precision_aware_optimizer() -> None:
    kept = OptimizerOptions(offload_fraction=1.0, offload_master=False)
    moved = OptimizerOptions(offload_fraction=1.0)
    assert held(TrainMemoryOptions(optimizer=kept))["optimizer"] > 0
    assert "optimizer" not in held(TrainMemoryOptions(optimizer=moved))
    assert kept.offloaded_bytes_per_param == 8.0
    assert moved.offloaded_bytes_per_param == 12.0


def test_an_adapter_keeps_gathered_inputs_and_its_own_outputs() -> None:
    for layout in (TrainLayout(dp=8), TrainLayout(tp=2, dp=4, sequence_parallel=True)):
        full = held(TrainMemoryOptions(), layout)
        adapter = held(TrainMemoryOptions(trainable_fraction=0.005), layout)
        assert adapter["activations"] > 1.2 * full["activations"]
        assert adapter["gradients"] < 0.01 * full["gradients"]


def test_fsdp_with_a_pipeline_keeps_weights_gathered_and_gradients_whole() -> None:
    flat = held(TrainMemoryOptions(engine="fsdp2"), TrainLayout(dp=8))
    piped = held(TrainMemoryOptions(engine="fsdp2", num_microbatches=8, merged_outputs=True), TrainLayout(pp=2, dp=4))
    params = find_model("qwen3-8b").params_total
    assert flat["unsharded gradients"] < 0.5 * params
    assert piped["unsharded gradients"] > 4.0 * params / 2 * 0.9
    assert piped.get("merged outputs", 1.0) > 0


def test_prediction_layers_cost_activations_and_logits() -> None:
    layout = TrainLayout(dp=8, ep=8)
    plain = held(TrainMemoryOptions(), layout, "deepseek-v3")
    predicting = held(TrainMemoryOptions(mtp_layers=1), layout, "deepseek-v3")
    assert predicting["activations"] > plain["activations"]
    assert predicting["logits"] > plain["logits"]
    assert predicting["parameters"] > plain["parameters"]


def test_graphs_keep_their_activations_in_a_pool_of_their_own() -> None:
    model, layout = find_model("llama3.1-70b"), TrainLayout(tp=4, pp=4, dp=2, sequence_parallel=True)
    plain = TrainMemoryOptions(tokens_per_gpu=4096, num_microbatches=16)
    eager, graphed = (
        train_memory(model, layout, replace(plain, graphed_modules=frozenset(modules))) for modules in ((), ("mlp",))
    )
    pool = next(term.value for term in graphed.outside_terms if term.name == "graph pool")
    assert pool > 0
    assert graphed.peak_bytes.mid < eager.peak_bytes.mid  # as PyTorch counts
    assert graphed.device_bytes.mid > sum(term.value for term in graphed.terms) + pool  # as the driver does
    recomputed = replace(plain, recompute="selective", recompute_modules=frozenset({"mlp"}))
    assert train_memory(model, layout, replace(recomputed, graphed_modules=frozenset({"mlp"}))) == train_memory(
        model, layout, recomputed
    )


def test_the_native_allocator_needs_more_room_than_expandable_segments() -> None:
    memory = train_memory(find_model("qwen3-8b"), TrainLayout(dp=8), TrainMemoryOptions())
    allocated = sum(term.value for term in memory.terms)
    assert allocated < memory.needed_bytes(expandable_segments=True) < memory.needed_bytes(expandable_segments=False)


def test_heads_too_wide_for_flash_attention_keep_their_scores() -> None:
    model, layout = find_model("gemma-4-26b-a4b-it"), TrainLayout(dp=8, ep=8)
    whole = train_memory(model, layout, TrainMemoryOptions())
    again = train_memory(model, layout, TrainMemoryOptions(recompute="selective", recompute_modules=frozenset({"core_attn"})))
    scores = 5 * 16 * 8192.0 * 8192 * 2  # five global layers, sixteen heads
    assert whole.peak_bytes.mid - again.peak_bytes.mid > 0.8 * scores


def test_a_frozen_vision_tower_keeps_weights_only() -> None:
    model, layout = find_model("gemma-4-26b-a4b-it"), TrainLayout(dp=8, ep=8)
    assert model.vision is not None
    trained, frozen = (train_memory(model, layout, TrainMemoryOptions(frozen_vision=each)) for each in (False, True))
    assert trained.static_bytes - frozen.static_bytes == pytest.approx(model.vision.params * (4 + 12 / 8))


def test_shards_on_the_host_leave_the_gpu() -> None:
    model, layout = find_model("qwen3-8b"), TrainLayout(dp=8)
    kept, moved = (
        train_memory(model, layout, TrainMemoryOptions(engine="fsdp2", offload_shards=each)) for each in (False, True)
    )
    assert moved.host_bytes == pytest.approx(model.params_total / 8 * 16)
    assert kept.static_bytes - moved.static_bytes == pytest.approx(moved.host_bytes)


def test_a_soft_cap_keeps_its_tanh() -> None:
    model, layout = find_model("gemma-2-9b"), TrainLayout(dp=8)
    assert model.logit_softcap
    capped, plain = (
        next(term.value for term in train_memory(each, layout, TrainMemoryOptions()).terms if term.name == "logits")
        for each in (model, replace(model, logit_softcap=False))
    )
    assert capped - plain == pytest.approx(2.0 * 8192 * model.vocab_size)


def test_layers_recomputed_together_keep_fewer_inputs_and_come_back_together() -> None:
    model, layout = find_model("qwen3-8b"), TrainLayout(dp=8)
    one, two = (
        train_memory(model, layout, TrainMemoryOptions(recompute="full", recompute_chunk=chunk)).terms for chunk in (1, 18)
    )
    kept, live = ({term.name: term.value for term in terms} for terms in (one, two))
    assert live["activations"] == pytest.approx(kept["activations"] / 18)
    assert live.get("backward", 0.0) > kept.get("backward", 0.0)
