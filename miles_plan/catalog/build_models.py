"""Regenerates `models.json`, the catalog's data file, from launch-script rows and published configurations.

    python -m miles_plan.catalog.build_models model_archs.jsonl published_configs.json > models.json

The first file has one JSON row a model in the Megatron flag vocabulary of Miles and slime (`num_layers`,
`num_query_groups`, `moe_ffn_hidden_size`, ...). The second, kept beside this module, holds published `config.json`
sizes of models that those launchers do not ship, and corrections of rows that disagree with the published file; a name
in it replaces the row. Both go through the same reader as a user's own `config.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from miles_plan.catalog.architecture import ModelArchitecture, architecture_to_dict
from miles_plan.catalog.hf_config import architecture_from_hf_config

Row = Mapping[str, Any]

_FAMILIES = (  # name prefix -> model_type, most specific first
    ("deepseek-v4", "deepseek_v4"),
    ("deepseek-v32", "deepseek_v32"),
    ("deepseek", "deepseek_v3"),
    ("kimi", "kimi_k2"),
    ("glm5", "glm_moe_dsa"),
    ("glm4.7-flash", "glm4_moe_lite"),
    ("glm4.7-30b", "glm4_moe_lite"),
    ("glm4.5", "glm4_moe"),
    ("glm4", "glm4"),
    ("gemma-4", "gemma4"),
    ("gpt-oss", "gpt_oss"),
    ("inkling", "inkling"),
    ("minimax", "minimax_m2"),
    ("nemotron", "nemotron_h"),
    ("qwen3-next", "qwen3_next"),
    ("qwen3.", "qwen3_5"),
    ("qwen3", "qwen3"),
    ("qwen2", "qwen2"),
    ("mimo", "mimo"),
    ("joyai", "deepseek_v3"),
    ("moonlight", "deepseek_v3"),
    ("llama", "llama"),
)


_GEMMA_4_VISION = {
    "model_type": "gemma4_vision",
    "num_hidden_layers": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 16,
}
"""The image encoder of the 26B and 31B models, about 550 M parameters (their model card), which the launchers leave out."""


def config_from_row(row: Row) -> dict[str, Any]:
    """The `config.json` a launch-script row describes."""
    name = row["name"].lower()
    family = next((family for prefix, family in _FAMILIES if name.startswith(prefix)), "llama")
    config: dict[str, Any] = {
        "model_type": family,
        "hidden_size": row["hidden_size"],
        "num_hidden_layers": row["num_layers"],
        "vocab_size": row["vocab_size"],
        "intermediate_size": row["ffn_hidden_size"],
        "num_attention_heads": row["num_attention_heads"],
        "num_key_value_heads": row["num_query_groups"] or row["num_attention_heads"],
        "head_dim": row["kv_channels"],
        "tie_word_embeddings": row["tie_embeddings"],
        "attention_bias": row["add_qkv_bias"],
        "use_qk_norm": row["qk_layernorm"],
        "num_nextn_predict_layers": row["mtp_num_layers"] or 0,
    }
    config |= _moe_keys(row, family) | _latent_keys(row) | _linear_keys(row) | _special_keys(row, family)
    return config


def _moe_keys(row: Row, family: str) -> dict[str, Any]:
    if not row["num_experts"]:
        return {}
    shared = row["moe_shared_expert_intermediate_size"]
    if family == "inkling":  # the script's size is of one of two shared experts
        shared *= 2
    dense = row["n_dense_ffn_layers"] if family != "nemotron_h" else 0
    return {
        "num_experts": row["num_experts"],
        "num_experts_per_tok": row["moe_topk"],
        "moe_intermediate_size": row["moe_ffn_hidden_size"],
        "shared_expert_intermediate_size": shared,
        "moe_latent_size": row["moe_latent_size"],
        "first_k_dense_replace": dense,
    }


def _latent_keys(row: Row) -> dict[str, Any]:
    dims = row["hybrid_or_indexer_dims"] or {}
    keys: dict[str, Any] = {}
    if latent := row["mla"]:
        keys = {
            "q_lora_rank": latent["q_lora_rank"],
            "kv_lora_rank": latent["kv_lora_rank"],
            "qk_nope_head_dim": latent["qk_head_dim"],
            "qk_rope_head_dim": latent["qk_pos_emb_head_dim"],
            "v_head_dim": latent["v_head_dim"],
        }
    if dims.get("kind") == "dsa":
        keys |= {key: dims[key] for key in ("index_n_heads", "index_head_dim")}
        keys["index_topk_freq"] = dims.get("index_topk_freq", 1)
    return keys


def _linear_keys(row: Row) -> dict[str, Any]:
    dims = row["hybrid_or_indexer_dims"] or {}
    return {key: value for key, value in dims.items() if key.startswith("linear_") or key == "full_attention_interval"}


def _special_keys(row: Row, family: str) -> dict[str, Any]:
    dims = row["hybrid_or_indexer_dims"] or {}
    if family == "deepseek_v4":
        return _dsv4_keys(row)
    if family == "gpt_oss":
        types = ["full_attention" if at % 2 else "sliding_attention" for at in range(row["num_layers"])]
        return {"layer_types": types, "sliding_window": int(row["window_size"].split(",")[0])}
    if family == "gemma4":
        return {
            "global_head_dim": dims["global_head_dim"],
            "num_global_key_value_heads": dims["num_global_key_value_heads"],
            "attention_k_eq_v": dims["k_eq_v_full"],
            "sliding_window_pattern": row["num_layers"] // dims["n_full"],
            "sliding_window": 1024,
            "final_logit_softcapping": 30.0,
            "vision_config": _GEMMA_4_VISION,
        }
    if family == "nemotron_h":
        return {key: value for key, value in dims.items() if not key.startswith(("kind", "n_m", "n_a", "n_f", "unc"))}
    if family == "inkling":
        return {"d_rel": dims["d_rel"], "n_shared_experts": dims["n_shared_experts"]}
    return {}


def _dsv4_keys(row: Row) -> dict[str, Any]:
    dims = row["dsv4"]
    return {
        "head_dim": row["mla"]["v_head_dim"],
        "hc_mult": int(dims["dsv4_hc_mult"]),
        "compress_ratios": [int(each) for each in dims["dsv4_compress_ratios"]],
        "o_groups": int(dims["dsv4_o_groups"]),
        "o_lora_rank": int(dims["dsv4_o_lora_rank"]),
        "sliding_window": int(dims["dsv4_window_size"]),
        "index_n_heads": int(dims["dsa_indexer_n_heads"]),
        "index_head_dim": int(dims["dsa_indexer_head_dim"]),
        "index_topk": int(dims["dsa_indexer_topk"]),
    }


def build(rows: Iterable[Row], published: Mapping[str, Any]) -> dict[str, Any]:
    """The data file: canonical lower-case names to architectures with aliases, and each row's published figures."""
    made: dict[str, tuple[ModelArchitecture, list[str]]] = {}
    for name, entry in published["models"].items():
        made[name] = (architecture_from_hf_config(entry["config"], name, entry["source"]), entry.get("aliases", []))
    for row in rows:
        name = row["name"].lower()
        if name in made or name in published["skip"]:
            continue
        pattern = published["hybrid_patterns"].get(name)
        config = config_from_row(row) | ({"hybrid_override_pattern": pattern} if pattern else {})
        source = f"{row['repo']} {row['path']} @{row['source_commit'][:9]}"
        made[name] = (architecture_from_hf_config(config, name, source), [])
    models = {}
    for name in sorted(made):
        model, aliases = made[name]
        plain = architecture_to_dict(model)
        plain.pop("name")
        models[name] = {"aliases": sorted([*aliases, *published["aliases"].get(name, [])]), **plain}
    return {"schema": 1, "models": models}


def main(arguments: list[str]) -> int:
    """Print the data file."""
    rows_path, published_path = arguments
    rows = [json.loads(line) for line in Path(rows_path).read_text().splitlines() if line.strip()]
    published = json.loads(Path(published_path).read_text())
    models = build(rows, published)["models"]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(model)}" for name, model in models.items())
    sys.stdout.write(f'{{"schema": 1, "models": {{\n{lines}\n}}}}\n')
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
