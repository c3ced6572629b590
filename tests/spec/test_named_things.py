from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles_plan.diagnostics import Diagnostic
from miles_plan.spec import load_job
from miles_plan.spec.entry_points import look_up
from miles_plan.spec.named_things import named_things
from tests.spec.example import write

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 256,
}


def found(directory: Path, *sets: str) -> list[Diagnostic]:
    return list(named_things(load_job(write(directory), sets)))


def codes(directory: Path, *sets: str) -> list[tuple[str, str]]:
    return [(each.code, each.field) for each in found(directory, *sets)]


def test_an_existing_world_has_no_findings(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("{}")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"")
    data, weights = tmp_path / "p.jsonl", tmp_path / "weights"
    assert codes(tmp_path, f"data.prompts={data}", "model.name=null", f"model.checkpoint={weights}") == []
    assert codes(tmp_path, "model.name=null", f"model.hf_config={weights}/config.json", f"model.tokenizer.path={weights}") == []


def test_every_kind_of_name_is_looked_up(tmp_path: Path) -> None:
    assert codes(tmp_path, "model.name=qwen9") == [("MP140", "model.name")]
    teacher = ("algorithm.kind=distillation", "algorithm.teacher.model.name=qwen9")
    assert codes(tmp_path, *teacher) == [("MP140", "algorithm.teacher.model.name")]
    assert codes(tmp_path, "cluster.gpu=h9") == [("MP141", "cluster.gpu")]
    assert codes(tmp_path, "data.prompts=/no/such.jsonl") == [("MP142", "data.prompts")]
    assert codes(tmp_path, "data.reward=maths") == [("MP144", "data.reward")]


def test_models_and_gpus_are_found_in_any_case(tmp_path: Path) -> None:
    assert codes(tmp_path, "model.name=Qwen/Qwen3-8B", "cluster.gpu=H100") == []


@pytest.mark.parametrize(
    "change", [{"hidden_size": 10**18}, {"hidden_size": "64"}, {"vocab_size": -5}, {"num_hidden_layers": 0}]
)
def test_impossible_configurations(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "c.json").write_text(json.dumps({**CONFIG, **change}))
    assert codes(tmp_path, "model.name=null", f"model.hf_config={tmp_path}/c.json") == [("MP143", "model.hf_config")]


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 100_000, b'"x"', b"NaN", b" " * (17 << 20)]
)
def test_configuration_files_that_are_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "c.json").write_bytes(raw)
    assert codes(tmp_path, "model.name=null", f"model.hf_config={tmp_path}/c.json") == [("MP143", "model.hf_config")]


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "w" / "pytorch_model.bin").write_bytes(b"")
    (finding,) = found(tmp_path, "model.name=null", f"model.checkpoint={tmp_path}/w")
    assert finding.code == "MP142"
    assert "safetensors" in finding.message


def test_a_reward_is_looked_at_and_never_imported(tmp_path: Path) -> None:
    canary = tmp_path / "imported"
    (tmp_path / "rewards.py").write_text(
        f"open({str(canary)!r}, 'w')\nasync def score(): ...\nlength = len\nfrom math import gcd as g\n"
    )
    package = tmp_path / "kit"
    package.mkdir()
    (package / "__init__.py").write_text("from kit.deep import *\n")
    (package / "broken.py").write_text("def (")
    expected = {
        "rewards:score": "found",
        "rewards:length": "found",
        "rewards:g": "found",
        "rewards:gcd": "no function",
        "rewards:scroe": "no function",
        "kit:anything": "found",
        "kit.broken:x": "found",
        "kit.gone:x": "no module",
        "no_such_module_at_all:x": "no module",
        "json:loads": "found",
        "json.decoder:JSONDecoder": "found",
    }
    assert {entry: look_up(entry, [tmp_path]) for entry in expected} == expected
    assert codes(tmp_path, "data.reward=rewards:score") == []
    assert not canary.exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
KEYS = [*CONFIG, "num_experts", "num_experts_per_tok", "moe_intermediate_size", "layer_types", "text_config", "vision_config"]


@settings(max_examples=300, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    change=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3),
    dropped=st.sets(st.sampled_from(list(CONFIG)), max_size=2),
)
def test_any_configuration(tmp_path: Path, change: dict[str, Any], dropped: set[str]) -> None:
    config = {key: value for key, value in {**CONFIG, **change}.items() if key not in dropped}
    (tmp_path / "c.json").write_text(json.dumps(config))
    assert set(codes(tmp_path, "model.name=null", f"model.hf_config={tmp_path}/c.json")) <= {("MP143", "model.hf_config")}
