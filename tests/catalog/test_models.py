import json
from pathlib import Path
from typing import Any

import pytest

from miles_plan.catalog.architecture import architecture_from_dict, architecture_to_dict
from miles_plan.catalog.models import find_model, model_aliases, model_names

# Totals in billions: model cards and safetensors indexes; active where the card states its convention.
PUBLISHED = {
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-7b": 7.616,
    "qwen2.5-72b": 72.706,
    "qwen3-8b": 8.191,
    "qwen3-30b-a3b": 30.53,
    "qwen3-235b-a22b": 235.09,
    "qwen3.5-397b-a17b": 396.3,
    "llama3.1-405b": 405.85,
    "mixtral-8x7b": 46.70,
    "deepseek-v3": 671.03,
    "deepseek-v4-flash": 284.3,
    "kimi-k2": 1026.4,
    "glm4-9b": 9.40,
    "glm4-32b": 32.57,
    "glm5-744b-a40b": 743.9,
    "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.83,
    "gemma-4-26b-a4b-it": 25.23,
    "gemma-4-31b-it": 30.70,
    "minimax-m2": 228.69,
    "nemotron-3-nano-30b-a3b": 31.58,
    "nemotron-3-super-120b-a12b": 120.67,
    "nemotron-4-340b": 341.0,
    "moonlight": 15.96,
    "mpt-70b": 64.86,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_parameters_are_the_published_ones(name: str) -> None:
    assert find_model(name).params_total / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)


@pytest.mark.parametrize(
    ("name", "active"),
    [("deepseek-v3", 37.55), ("qwen3-30b-a3b", 3.35), ("nemotron-3-nano-30b-a3b", 3.58), ("kimi-k2", 32.86)],
)
def test_active_parameters_are_the_published_ones(name: str, active: float) -> None:
    assert find_model(name).params_active / 1e9 == pytest.approx(active, rel=0.005)


# One line a launcher's model: what its card, technical report or safetensors index says, in billions.
LAUNCHED = [json.loads(line) for line in (Path(__file__).parent / "published_totals.jsonl").read_text().splitlines()]
# Cards that count something else: 48 of "48B-A3B" is cut off, not rounded; 32.5 leaves 0.26 B of the checkpoint's 32.764 out;
# 7.83 counts the prediction layer.
OTHER_COUNTS = {"joyai-llm-flash": 48.94, "qwen2.5-32b": 32.764, "mimo-7b-rl": 7.623}


@pytest.mark.parametrize("row", LAUNCHED, ids=lambda row: row["name"])
def test_every_model_of_a_launcher_is_there_with_its_published_size(row: dict[str, Any]) -> None:
    model = find_model(row["name"])
    if "total_b" in row:
        total = OTHER_COUNTS.get(row["name"], row["total_b"])
        assert model.params_total / 1e9 == pytest.approx(total, rel=0.005, abs=half_a_digit(total))
    if "active_b" in row and row["name"] != "inkling":  # whose 41 counts 0.6 B that its launcher's sizes do not explain
        # Cards count embeddings or leave them out.
        slack = max(0.005 * row["active_b"], half_a_digit(row["active_b"]))
        low, high = model.params_active_nonembedding / 1e9 - slack, model.params_active / 1e9 + slack
        assert low <= row["active_b"] <= high


def half_a_digit(stated: float) -> float:
    """Half a unit of the last digit that a figure is written with: 3 and 235 are known to 0.5, 1600 to 50, 4.0 to 0.05."""
    digits = f"{stated:.10g}"
    if "." in digits:
        return 0.5 * 10 ** -len(digits.split(".")[1])
    if isinstance(stated, float) and stated < 10:
        return 0.05
    return 0.5 * 10 ** (len(digits) - len(digits.rstrip("0"))) if stated >= 1000 else 0.5


def test_vision_towers_count_in_the_checkpoint_only() -> None:
    model = find_model("qwen3-vl-8b")
    assert model.params_total == find_model("qwen3-8b").params_total
    assert model.params_checkpoint / 1e9 == pytest.approx(8.767, rel=0.002)


def test_components_add_up() -> None:
    for name in model_names():
        model = find_model(name)
        parts = model.params_by_component()
        assert model.params_total == sum(parts.values()) - parts["mtp"] - parts["vision"]
        assert 0 < model.params_active <= model.params_total


def test_every_model_survives_its_plain_form() -> None:
    for name in model_names():
        model = find_model(name)
        assert architecture_from_dict(architecture_to_dict(model)) == model


def test_aliases_lead_to_models_and_owner_and_case_do_not_matter() -> None:
    assert not set(model_aliases()) & set(model_names())
    assert all(find_model(alias) for alias in model_aliases())
    assert find_model("Qwen/Qwen3-8B") is find_model("qwen3-8b")


def test_an_unknown_name_gets_near_ones() -> None:
    with pytest.raises(ValueError, match=r"no model called 'qwen3-9b'; did you mean .*qwen3-8b"):
        find_model("qwen3-9b")


def test_a_cut_keeps_the_first_layers() -> None:
    cut = find_model("deepseek-v3").cut(5, "deepseek-v3-first-5")
    assert cut.params_total == find_model("deepseek-v3-5layer").params_total
    with pytest.raises(ValueError, match="cannot keep 99"):
        find_model("deepseek-v3").cut(99, "too-deep")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_size": -1}, "hidden_size: -1"), ({"runs": [[3, 2]]}, "runs"), ({"colour": 1}, "colour")],
)
def test_impossible_architectures_are_refused_by_key(change: dict[str, object], message: str) -> None:
    plain = architecture_to_dict(find_model("qwen3-0.6b")) | change
    with pytest.raises(ValueError, match=message):
        architecture_from_dict(plain)
