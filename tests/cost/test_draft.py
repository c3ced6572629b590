from dataclasses import replace

import pytest

from miles_plan.catalog.ffns import DenseFfn
from miles_plan.catalog.gpus import cluster_of, find_gpu
from miles_plan.catalog.models import find_model
from miles_plan.cost.draft import draft_of
from miles_plan.cost.rollout_memory import RolloutMemoryOptions, rollout_memory
from miles_plan.cost.train_memory import train_memory
from miles_plan.cost.train_options import TrainMemoryOptions
from miles_plan.cost.weight_sync import SyncOptions, weight_sync_time
from miles_plan.ir.layout import RolloutLayout, TrainLayout


def test_a_prediction_layer_is_the_models_own() -> None:
    model = replace(find_model("deepseek-v3"), mtp_layers=1)
    assert draft_of(model, "mtp").params == model.mtp_params


def test_eagle_is_a_dense_layer_as_wide_as_what_a_token_meets() -> None:
    model = find_model("qwen3-30b-a3b")
    layer = draft_of(model, "eagle").layer
    assert layer.mixer == model.kinds[-1].mixer
    assert layer.ffn == DenseFfn(size=8 * 768)
    assert 0 < draft_of(model, "eagle").params < 0.01 * model.params_total


def test_hybrids_join_their_last_mixer_and_their_last_feed_forward_part() -> None:
    layer = draft_of(find_model("nemotron-3-nano-30b-a3b"), "mtp").layer
    assert layer.mixer is not None
    assert layer.ffn is not None


def test_an_engine_holds_the_drafts_weights_and_its_cache() -> None:
    model, gpu, layout = find_model("qwen3-8b"), find_gpu("h100"), RolloutLayout(tp=2)
    plain = rollout_memory(model, layout, RolloutMemoryOptions(), gpu)
    drafted = rollout_memory(model, layout, RolloutMemoryOptions(draft=draft_of(model, "eagle")), gpu)
    assert drafted.kv_bytes_per_token == pytest.approx(plain.kv_bytes_per_token * 37 / 36)
    assert drafted.weight_bytes > plain.weight_bytes
    assert drafted.pool_tokens < plain.pool_tokens


@pytest.mark.parametrize("engine", ["megatron", "fsdp2", "torch"])
def test_a_trainer_holds_its_weights_gradients_and_state(engine: str) -> None:
    model, layout = find_model("qwen3-8b"), TrainLayout(tp=2, dp=4, sequence_parallel=engine == "megatron")
    options = TrainMemoryOptions(engine=engine)  # type: ignore[arg-type]  # one of the three
    own = float(draft_of(model, "eagle").params)
    plain, drafted = (train_memory(model, layout, replace(options, draft_params=size)) for size in (0.0, own))
    shards = 1.0 if engine == "torch" else 4.0
    assert drafted.static_bytes - plain.static_bytes == pytest.approx(own / 2 * (2 + 4 + 12 / shards))
    scoring = train_memory(model, layout, replace(options, draft_params=own, forward_only=True))
    assert all(term.name != "draft" for term in scoring.terms)


def test_it_travels_with_the_policys_weights() -> None:
    model = find_model("qwen3-8b")
    own = float(draft_of(model, "eagle").params)

    def seconds(options: SyncOptions) -> float:
        return weight_sync_time(
            model, TrainLayout(dp=8), RolloutLayout(engines=8), "nccl_broadcast", cluster_of("h100", 2), options
        ).term("broadcast")

    with_draft, alone = seconds(SyncOptions(draft_params=own)), seconds(SyncOptions())
    assert with_draft / alone == pytest.approx(1 + own / model.params_total)
