from __future__ import annotations

from pathlib import Path

import pytest

from miles_plan.diagnostics import Diagnostic, PlanError
from miles_plan.spec import load_job
from tests.spec.example import VALID, write


def findings(spec: str, *sets: str) -> tuple[Diagnostic, ...]:
    with pytest.raises(PlanError) as caught:
        load_job(spec, sets)
    return caught.value.diagnostics


def codes(spec: str, *sets: str) -> set[str]:
    return {each.code for each in findings(spec, *sets)}


def test_later_layers_win_and_mappings_merge(tmp_path: Path) -> None:
    write(tmp_path, VALID, "base.yaml")
    write(tmp_path, "rollout: {temperature: 0.5, top_p: 0.9}\nseed: 1\n", "second.yaml")
    spec = write(tmp_path, "base: [base.yaml, second.yaml]\nrollout: {temperature: 0.6}\n")
    job = load_job(spec, ["rollout.temperature=0.7"]).spec
    assert (job.rollout.temperature, job.rollout.top_p, job.seed, job.rollout.prompts_per_step) == (0.7, 0.9, 1, 32)
    assert load_job(spec).spec.rollout.temperature == 0.6


def test_a_base_of_a_base_is_relative_to_its_own_directory(tmp_path: Path) -> None:
    write(tmp_path, VALID, "common/job.yaml")
    write(tmp_path, "base: job.yaml\nseed: 4\n", "common/seeded.yaml")
    assert load_job(write(tmp_path, "base: ../common/seeded.yaml\n", "mine/spec.yaml")).spec.seed == 4


def test_a_scalar_replaces_a_mapping_and_the_other_way_round(tmp_path: Path) -> None:
    write(tmp_path, VALID + "placement: {rollout_gpus: 8}\n", "base.yaml")
    spec = write(tmp_path, "base: base.yaml\nplacement: colocate\n")
    assert load_job(spec).spec.placement == "colocate"
    split = load_job(spec, ["placement.rollout_gpus=4"]).spec.placement
    assert not isinstance(split, str)
    assert split.rollout_gpus == 4


def test_null_takes_a_value_of_the_base_away(tmp_path: Path) -> None:
    write(tmp_path, VALID, "base.yaml")
    spec = write(tmp_path, "base: base.yaml\nmodel: {name: null, checkpoint: weights}\n")
    assert load_job(spec).spec.model.checkpoint == "weights"


def test_cycles_of_bases_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    (finding,) = findings(str(tmp_path / "a.yaml"))
    assert finding.code == "MP104"
    assert finding.notes == ("a.yaml -> b.yaml -> a.yaml",)
    (tmp_path / "link.yaml").symlink_to(tmp_path / "c.yaml")
    write(tmp_path, "base: link.yaml\n", "c.yaml")
    assert codes(str(tmp_path / "c.yaml")) == {"MP104"}, "a link does not hide a circle"


def test_a_tree_of_bases_that_doubles_is_refused(tmp_path: Path) -> None:
    write(tmp_path, VALID, "f0.yaml")
    for level in range(1, 20):
        write(tmp_path, f"base: [f{level - 1}.yaml, f{level - 1}.yaml]\n", f"f{level}.yaml")
    assert "MP104" in codes(str(tmp_path / "f19.yaml"))


def test_all_files_together_have_one_budget(tmp_path: Path) -> None:
    for index in range(3):
        write(tmp_path, f"model: {{architecture: {{a{index}: [{', '.join(['x'] * 40_000)}]}}}}\n", f"b{index}.yaml")
    assert "MP103" in codes(write(tmp_path, "base: [b0.yaml, b1.yaml, b2.yaml]\n"))


@pytest.mark.parametrize("base", ["{a: 1}", "7", "[1]", "''", "null", "[[a.yaml]]"])
def test_base_must_be_paths(tmp_path: Path, base: str) -> None:
    assert "MP104" in codes(write(tmp_path, f"base: {base}\n{VALID}"))


@pytest.mark.parametrize("name", ["/etc/passwd", "/dev/zero", "..", "missing.yaml", '"a\\0b"', "'" + "x" * 5000 + "'"])
def test_hostile_bases_are_findings(tmp_path: Path, name: str) -> None:
    found = findings(write(tmp_path, f"base: {name}\n{VALID}"))
    assert {each.code for each in found} <= {"MP101", "MP110", "MP122", "MP102", "MP103"}


@pytest.mark.parametrize(
    "text",
    [
        "seed=\udc80",
        "name=a\nb",
        "rollout.temperature",
        "=1",
        "a..b=1",
        ".a=1",
        "a b=1",
        "a\n=1",
        "a\udc80=1",
        "",
        "base=x.yaml",
    ],
)
def test_overrides_of_another_form_are_refused(tmp_path: Path, text: str) -> None:
    assert codes(write(tmp_path), text) == {"MP105"}


def test_an_override_of_many_steps_is_refused(tmp_path: Path) -> None:
    assert codes(write(tmp_path), ".".join(["a"] * 100_000) + "=1") == {"MP105"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.7", 0.7), ("1e-1", 0.1), ("'0.7'", None), ("", None), ("[1]", None), ("warm", None)],
)
def test_the_value_of_an_override_is_yaml(tmp_path: Path, text: str, value: float | None) -> None:
    spec = write(tmp_path)
    if value is None:
        assert codes(spec, f"rollout.temperature={text}") == {"MP122"}
    else:
        assert load_job(spec, [f"rollout.temperature={text}"]).spec.rollout.temperature == value


def test_overrides_can_hold_mappings_and_reach_into_lists(tmp_path: Path) -> None:
    spec = write(tmp_path, VALID.replace("{gpu: h200, nodes: 2}", "{groups: [{gpu: h200}, {gpu: h100}]}"))
    job = load_job(spec, ["cluster.groups.1.nodes=3", "rollout.layout={tp: 2}"]).spec
    assert [group.nodes for group in job.cluster.groups] == [1, 3]
    assert not isinstance(job.rollout.layout, str)
    assert job.rollout.layout.tp == 2


def test_of_two_overrides_the_later_wins(tmp_path: Path) -> None:
    assert load_job(write(tmp_path), ["seed=1", "seed=2"]).spec.seed == 2


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, VALID.replace("{generator: arithmetic}", "data/a.jsonl"), "common/job.yaml")
    spec = write(tmp_path, "base: ../common/job.yaml\nevaluation: {every_steps: 5, prompts: e.jsonl}\n", "mine/spec.yaml")
    monkeypatch.chdir(tmp_path)
    loaded = load_job(spec, ["rollout.response_tokens={histogram: lengths.json, mean: auto, p99: auto}"])
    assert loaded.spec.data.prompts == "../common/data/a.jsonl"
    assert loaded.spec.evaluation.prompts == "e.jsonl"
    assert loaded.spec.rollout.response_tokens.histogram == "../lengths.json"
    assert loaded.file("e.jsonl") == tmp_path / "mine" / "e.jsonl"
