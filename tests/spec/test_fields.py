from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from miles_plan.diagnostics import PlanError
from miles_plan.spec import load_job
from miles_plan.spec.fields import all_fields, pattern_of
from miles_plan.spec.foreign_names import FOREIGN_NAMES
from miles_plan.spec.schema import json_schema
from tests.spec.example import VALID, write

EDGES = [
    "0",
    "-1",
    "9223372036854775808",
    "1e308",
    "-1e308",
    ".nan",
    ".inf",
    '"8"',
    "true",
    "1.5",
    "null",
    "[]",
    "{}",
    "''",
    "~x",
]

# Fields that stand in a section which a valid job does not have, with what has to be around them.
AROUND = {
    "algorithm.critic": ["algorithm.kind=ppo"],
    "algorithm.teacher": ["algorithm.kind=distillation", "algorithm.teacher.model.name=qwen3-8b"],
    "warm_start": ["warm_start.data.generator=arithmetic", "warm_start.steps=3", "warm_start.batch_size=4"],
    "evaluation.prompts": ["evaluation.prompts.generator=arithmetic"],
    "rollout.speculative": ["rollout.speculative.method=mtp"],
    "model.tokenizer": ["model.tokenizer.characters=abc"],
    "algorithm.teacher.model.tokenizer": ["algorithm.teacher.model.tokenizer.characters=abc"],
    "placement": ["placement.rollout_gpus=4"],
    "cluster.groups": [],
}


def test_every_field_says_what_it_means() -> None:
    for entry in all_fields().values():
        assert entry.meaning.endswith("."), f"{entry.path} has no docstring, or one that is no sentence"


def test_units_are_read_off_the_names() -> None:
    fields = all_fields()
    assert fields["data.reward_timeout_s"].unit == "seconds"
    assert fields["rollout.response_tokens.mean"].unit == "tokens"
    assert fields["weight_sync.bucket_mib"].unit == "MiB (2^20 bytes)"
    assert fields["rollout.temperature"].unit == ""
    assert fields["rollout.response_tokens"].unit == ""


def test_defaults_are_shown_as_a_spec_would_have_them() -> None:
    fields = all_fields()
    shown = {
        path: fields[path].default_text for path in ("algorithm.updates_per_rollout", "data.shuffle", "train", "warm_start")
    }
    assert shown == {
        "algorithm.updates_per_rollout": "1",
        "data.shuffle": "true",
        "train": "that of its fields",
        "warm_start": "absent",
    }


def test_foreign_names_lead_to_fields_and_hide_none_of_ours() -> None:
    assert set(FOREIGN_NAMES.values()) <= set(all_fields())
    assert not {f"{name}" for name in FOREIGN_NAMES} & {path for path in all_fields() if "." not in path}


def test_the_schema_has_every_section_and_the_base() -> None:
    schema = json_schema()
    top = {path for path in all_fields() if "." not in path}
    assert set(schema["properties"]) == top | {"base"}
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["RolloutSpec"]["properties"]["temperature"]["description"].startswith("Logits are divided")


def numbers_in(value: Any) -> list[float]:
    match value:
        case bool() | str() | None:
            return []
        case dict():
            return [number for each in value.values() for number in numbers_in(each)]
        case list():
            return [number for each in value for number in numbers_in(each)]
        case _:
            return [value]


@pytest.mark.parametrize("path", [path for path in all_fields() if "*" not in path])
def test_every_field_refuses_or_means_every_edge_value(path: str, tmp_path: Path) -> None:
    """A value is accepted as it is, or refused by a finding about that field; numbers that are accepted are finite."""
    spec = write(tmp_path, VALID)
    around = [each for prefix, sets in AROUND.items() if path.startswith(f"{prefix}.") for each in sets]
    for edge in EDGES:
        try:
            loaded = load_job(spec, [*around, f"{path}={edge}"])
        except PlanError as problem:
            for finding in problem.diagnostics:
                assert finding.location is not None
                assert finding.location.line
                assert finding.code in {"MP110", *(f"MP{number}" for number in range(120, 135))}, finding
        else:
            assert all(math.isfinite(number) for number in numbers_in(loaded.resolved()))
            assert loaded.origins.of(path).kind == "set"


@pytest.mark.parametrize("edge", [edge for edge in EDGES if edge not in ("null", "[]", "{}")])
def test_items_of_lists_too(edge: str, tmp_path: Path) -> None:
    spec = write(tmp_path, VALID.replace("{gpu: h200, nodes: 2}", "{groups: [{gpu: h200}, {gpu: h100}]}"))
    for field in ("gpu", "nodes", "gpus_per_node", "gpu_memory_gib", "host_memory_gib", "nic_gbps_per_gpu"):
        assert f"cluster.groups.*.{field}" == pattern_of(f"cluster.groups.1.{field}")
        is_count = field in ("nodes", "gpus_per_node")
        if (edge == "1.5" and not is_count and field != "gpu") or (edge == '"8"' and field == "gpu"):
            load_job(spec, [f"cluster.groups.1.{field}={edge}"])
            continue
        with pytest.raises(PlanError) as caught:
            load_job(spec, [f"cluster.groups.1.{field}={edge}"])
        assert [each.field for each in caught.value.diagnostics] == [f"cluster.groups.1.{field}"]


@pytest.mark.parametrize(
    ("path", "bad"),
    [
        ("seed", ["-1", "9223372036854775808", "1.0", "true", '"0"']),
        ("name", ["''", "A", "../x", "a/b", "'a\\nb'", "'" + "a" * 65 + "'", "-a", ".a", "é", "3.5"]),
        ("rollout.top_p", ["0", "1.0001", "-0.5", ".nan"]),
        ("rollout.temperature", ["0", "-1", ".inf", "1e308"]),
        ("train.optimizer.lr", ["0", "11", "auto"]),
        ("data.reward", ["'a b'", "'a:'", "':b'", "'a:b:c'", "'a-b:c'", "'os.system(1)'", "3"]),
        ("data.prompts", ["''", '"a\\0b"', '"a\\nb"', "3", "[a]"]),
        ("model.name", ["''", '"a\\nb"', "'<script>'", "'a;rm -rf'", "'$(x)'"]),
        ("precision.train", ["FP8", "bfloat16", "16"]),
        ("train.layout.stage_layers", ["3", "[1.5]", "[-1]", "[true]"]),
    ],
)
def test_values_that_must_be_refused(path: str, bad: list[str], tmp_path: Path) -> None:
    spec = write(tmp_path)
    for value in bad:
        with pytest.raises(PlanError):
            load_job(spec, [f"{path}={value}"])
