import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import miles_plan.catalog
from miles_plan.catalog.architecture import architecture_from_dict, architecture_to_dict
from miles_plan.catalog.hf_config import architecture_from_hf_config
from miles_plan.catalog.mixers import GatedDelta, GroupedQuery, MultiLatent
from miles_plan.catalog.models import find_model

CATALOG = Path(miles_plan.catalog.__file__).parent
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
QWEN3_5 = {
    "model_type": "qwen3_5",
    "text_config": {
        **QWEN3,
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 17408,
        "vocab_size": 248320,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "full_attention_interval": 4,
    },
}


def test_a_dense_config_reads_as_the_packaged_model() -> None:
    read = architecture_from_hf_config(QWEN3, "qwen3-8b")
    assert read.kinds == find_model("qwen3-8b").kinds
    assert read.params_total == find_model("qwen3-8b").params_total


def test_a_nested_hybrid_config_alternates_its_mixers() -> None:
    read = architecture_from_hf_config(QWEN3_5, "qwen3.5-27b")
    mixers = [type(read.kinds[kind].mixer) for kind in read.layer_kinds()]
    assert mixers[:4] == [GatedDelta, GatedDelta, GatedDelta, GroupedQuery]
    assert read.params_total == find_model("qwen3.5-27b").params_total


def test_a_latent_config_with_dense_first_layers() -> None:
    config = {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 129280,
        "num_nextn_predict_layers": 1,
    }
    read = architecture_from_hf_config(config, "v3")
    assert read.runs == ((0, 3), (1, 58))
    assert isinstance(read.kinds[0].mixer, MultiLatent)
    assert read.params_checkpoint / 1e9 == pytest.approx(684.5, rel=0.005)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": -3}, "num_hidden_layers = -3 is out of range"),
        ({"vocab_size": 1 << 40}, "vocab_size = 1099511627776 is out of range"),
        ({"intermediate_size": "wide"}, "intermediate_size must be a whole number, got 'wide'"),
        ({"num_key_value_heads": 5}, "num_key_value_heads = 5 does not divide 32 heads"),
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers = 10000000 is out of range"),
        ({"text_config": [1]}, r"text_config must be a mapping, got \[1\]"),
        ({"vision_config": "big"}, "vision_config must be a mapping, got 'big'"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers of 36"),
        ({"layer_types": 7}, "layer_types must be a list"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": ["x"]}, "mlp_only_layers must be a list of whole"),
        (
            {"model_type": "nemotron_h", "hybrid_override_pattern": "MX"},
            "hybrid_override_pattern has 'X'|mamba_num_heads is missing",
        ),
    ],
)
def test_bad_sizes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        architecture_from_hf_config({**QWEN3, **change}, "broken")


@given(
    hidden=st.integers(1, 64).map(lambda n: n * 128),
    layers=st.integers(1, 100),
    heads=st.sampled_from([8, 16, 32]),
    groups=st.sampled_from([1, 2, 4, 8]),
    ffn=st.integers(1, 40000),
    vocab=st.integers(2, 300000),
)
def test_parameters_grow_with_every_size(hidden: int, layers: int, heads: int, groups: int, ffn: int, vocab: int) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": ffn,
        "vocab_size": vocab,
    }
    base = architecture_from_hf_config({**QWEN3, **sizes}, "base").params_total
    for key in ("num_hidden_layers", "intermediate_size", "vocab_size"):
        assert architecture_from_hf_config({**QWEN3, **sizes, key: sizes[key] + 1}, "more").params_total > base


CONFIGS = [entry["config"] for entry in json.loads((CATALOG / "published_configs.json").read_text())["models"].values()]
VALUES = st.recursive(
    st.sampled_from([None, 0, -1, 1, 3, 1 << 40, 10**30, 0.5, 1e300, math.nan, True, "", "x", "8", "MEM*", 10_000_000]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "hidden_size", "model_type"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(
    config=st.sampled_from([QWEN3, QWEN3_5, *CONFIGS]),
    changes=st.dictionaries(
        st.sampled_from(
            sorted({key for config in CONFIGS for key in config} | {"text_config", "vision_config", "indexer_types"})
        ),
        VALUES,
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=300, deadline=None)
def test_a_config_is_read_or_refused_with_the_reason(config: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        model = architecture_from_hf_config(config | changes, "altered")
    except ValueError:
        return
    assert model.params_checkpoint >= model.params_total >= model.params_active >= 0


@given(
    name=st.sampled_from(["qwen3-30b-a3b", "deepseek-v4-flash", "gemma-4-26b-a4b-it", "nemotron-3-nano-30b-a3b"]),
    key=st.sampled_from(["hidden_size", "vocab_size", "tie_embeddings", "kinds", "runs", "vision", "mtp_layers", "source"]),
    value=VALUES,
)
@settings(max_examples=200, deadline=None)
def test_an_architecture_is_read_or_refused_with_the_reason(name: str, key: str, value: object) -> None:
    plain = architecture_to_dict(find_model(name)) | {key: value}
    try:
        model = architecture_from_dict(plain)
    except ValueError:
        return
    assert model.params_checkpoint >= model.params_total >= model.params_active >= 0
