from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from miles_plan.diagnostics import Location, PlanError
from miles_plan.spec import JobSpec, job_from_mapping, load_job
from miles_plan.spec.limits import MAX_FINDINGS
from tests.spec.example import VALID, write


def mapping() -> dict[str, Any]:
    return {
        "version": 1,
        "name": "example",
        "model": {"name": "qwen3-30b-a3b"},
        "cluster": {"gpu": "h200", "nodes": 2},
        "algorithm": {"kind": "grpo", "clip": 0.2, "clip_high": 0.28},
        "data": {"prompts": {"generator": "arithmetic"}, "reward": "exact_match"},
        "rollout": {
            "prompts_per_step": 32,
            "samples_per_prompt": 8,
            "response_tokens": {"max": 8192, "mean": 3500, "p99": 8000},
        },
    }


def test_a_whole_job_fits_in_thirty_lines(tmp_path: Path) -> None:
    assert VALID.count("\n") < 30
    load_job(write(tmp_path))


def test_a_mapping_is_the_same_job_as_the_file(tmp_path: Path) -> None:
    loaded = job_from_mapping(mapping())
    assert loaded.spec == load_job(write(tmp_path)).spec
    assert loaded.spec != load_job(write(tmp_path), ["seed=1"]).spec
    assert loaded.spec.rollout != load_job(write(tmp_path), ["rollout.top_p=0.9"]).spec.rollout
    assert loaded.origins.of("seed").kind == "default"
    assert loaded.origins.of("name").kind == "file"


def test_findings_about_a_mapping_name_the_field() -> None:
    data = mapping()
    data["rollout"]["temprature"] = 1
    with pytest.raises(PlanError) as caught:
        job_from_mapping(data)
    (finding,) = caught.value.diagnostics
    assert (finding.code, finding.field) == ("MP120", "rollout.temprature")


def test_a_mapping_must_be_json_like() -> None:
    with pytest.raises(TypeError, match="strings"):
        job_from_mapping({1: 2})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="Path"):
        job_from_mapping({"a": Path()})


def test_origins_of_defaults_files_and_overrides(tmp_path: Path) -> None:
    base = write(tmp_path, VALID, "base.yaml")
    spec = write(tmp_path, "base: base.yaml\nseed: 7\n")
    origins = load_job(spec, ["rollout.top_p=0.9"]).origins
    assert origins.of("rollout.temperature").kind == "default"
    assert str(origins.of("seed")) == f"{spec}:2:7"
    assert origins.of("rollout.prompts_per_step").location == Location(base, 8, 21, 8, 23)
    override = origins.of("rollout.top_p")
    assert (override.kind, str(override)) == ("set", "--set:1:15")
    assert origins.of("no.such.field").kind == "default"


def test_a_diagnostic_about_a_default_points_at_the_section_around_it(tmp_path: Path) -> None:
    spec = write(tmp_path)
    loaded = load_job(spec)
    assert (loaded.at("rollout.temperature").line, loaded.at("rollout.response_tokens.max").line) == (7, 10)
    assert loaded.at("train.layout.tp").line == 1


def test_the_hash_is_of_the_meaning_not_of_the_text(tmp_path: Path) -> None:
    plain = load_job(write(tmp_path)).sha256()
    lines = VALID.splitlines()
    reordered = "\n".join(["# a comment", *lines[4:6], *lines[:4], *lines[6:], "seed: 0"])
    assert load_job(write(tmp_path, reordered)).sha256() == plain
    assert load_job(write(tmp_path), ["seed=0"]).sha256() == plain
    assert load_job(write(tmp_path), ["seed=1"]).sha256() != plain
    assert job_from_mapping(mapping()).sha256() == plain


def test_the_hash_is_stable() -> None:
    """A change here changes what `run plan.json` accepts: bump it only with a new field or default."""
    assert len(job_from_mapping(mapping()).sha256()) == 64
    assert set(job_from_mapping(mapping()).resolved()) == set(JobSpec.model_fields)


def test_all_mistakes_at_once_sorted_by_place(tmp_path: Path) -> None:
    text = VALID.replace("gpu: h200", "gpuu: h200").replace("clip: 0.2", "clip: x").replace("reward: exact_match", "reward: 3")
    text += "train: {engine: torhc}\ntrain: {}\nschedule: {mode: synchronous, max_staleness: 2}\n"
    with pytest.raises(PlanError) as caught:
        load_job(write(tmp_path, text), ["rollout.top_p=2"])
    found = caught.value.diagnostics
    assert [each.code for each in found] == ["MP123", "MP120", "MP122", "MP122", "MP124", "MP111", "MP131"]
    places = [each.location for each in found]
    assert places == sorted(places)  # type: ignore[type-var]


def test_what_only_follows_from_a_mistake_in_the_yaml_is_not_told(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        load_job(write(tmp_path, VALID + "seed: !!int 3\n"))
    assert [each.code for each in caught.value.diagnostics] == ["MP112"]


def test_rules_run_although_other_sections_are_wrong(tmp_path: Path) -> None:
    text = VALID.replace("mean: 3500", "mean: 9000") + "train: {engine: 5}\ncolour: red\n"
    with pytest.raises(PlanError) as caught:
        load_job(write(tmp_path, text))
    assert {each.code for each in caught.value.diagnostics} == {"MP120", "MP122", "MP132"}


def test_two_missing_keys_of_one_section_are_two_findings(tmp_path: Path) -> None:
    text = VALID.replace("  prompts_per_step: 32\n", "").replace("  response_tokens: {max: 8192, mean: 3500, p99: 8000}\n", "")
    with pytest.raises(PlanError) as caught:
        load_job(write(tmp_path, text))
    assert [each.field for each in caught.value.diagnostics] == ["rollout.prompts_per_step", "rollout.response_tokens"]


def test_findings_are_capped_and_say_so(tmp_path: Path) -> None:
    text = VALID + "".join(f"key_{index}: 1\n" for index in range(5_000))
    with pytest.raises(PlanError) as caught:
        load_job(write(tmp_path, text))
    assert len(caught.value.diagnostics) == MAX_FINDINGS
    assert caught.value.diagnostics[-1].notes == ("further findings are not shown",)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- 1\n", "word\n", "1\n", "null\n", "---\n", "'quoted'\n"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(PlanError) as caught:
        load_job(write(tmp_path, text))
    assert {each.code for each in caught.value.diagnostics} == {"MP122"}


def test_a_spec_built_in_python_keeps_the_rules_too() -> None:
    data = mapping()
    JobSpec.model_validate(data)
    data["rollout"]["response_tokens"]["mean"] = 9000
    with pytest.raises(ValidationError, match=r"rollout\.response_tokens\.mean"):
        JobSpec.model_validate(data)
