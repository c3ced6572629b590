"""What stops a run before anything starts: plans that cannot run here, data and models that cannot be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miles_plan.backends.executor.cluster import check_cluster
from miles_plan.backends.executor.failures import RunError
from miles_plan.backends.executor.preflight import preflight, satisfies
from miles_plan.backends.executor.run import execute
from miles_plan.backends.executor.run_directory import RunDirectory
from miles_plan.backends.executor.unsupported import unsupported
from miles_plan.backends.torch_engine.weights import initialise_checkpoint
from miles_plan.diagnostics import PlanError
from miles_plan.ir.group import DeviceGroup
from miles_plan.ir.layout import RolloutLayout, TrainLayout
from miles_plan.ir.plan import ClusterSummary, DataSource, ModelSource, Plan, TokenizerSource
from miles_plan.ir.tasks import Speculation
from tests.backends.executor.tiny_plans import MOE, tiny_plan


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    found = RunDirectory(tmp_path)
    found.make()
    return found


def with_task(plan: Plan, name: str, **fields: Any) -> Plan:
    return replace(plan, graph=plan.graph.with_replaced(replace(plan.graph.task(name), **fields)))


def with_group(plan: Plan, name: str, **fields: Any) -> Plan:
    groups = tuple(replace(group, **fields) if group.name == name else group for group in plan.graph.groups)
    return replace(plan, graph=replace(plan.graph, groups=groups))


SPECULATION = Speculation(method="mtp", steps=3, topk=1, draft_tokens=4, accept_length=2.0)
H200 = ClusterSummary(gpu="h200", nodes=2, gpus_per_node=1, gpu_memory_bytes=1, host_memory_bytes=1)

UNSUPPORTED = {
    "megatron": (lambda plan: with_group(plan, "train", engine="megatron"), "MP444"),
    "an engine on the wrong side": (lambda plan: with_group(plan, "train", engine="sglang"), "MP430"),
    "two trainers": (
        lambda plan: replace(
            plan,
            graph=replace(
                plan.graph,
                groups=(
                    *plan.graph.groups,
                    DeviceGroup(
                        name="critic", role="train", engine="torch", gpus=plan.graph.groups[0].gpus, train_layout=TrainLayout()
                    ),
                ),
            ),
        ),
        "MP431",
    ),
    "fp8": (lambda plan: replace(plan, run=replace(plan.run, rollout_dtype="fp8_blockwise")), "MP432"),
    "two nodes": (lambda plan: replace(tiny_plan(colocated=False), cluster=H200), "MP433"),
    "catalog model": (lambda plan: replace(plan, run=replace(plan.run, model=ModelSource(name="qwen3-8b"))), "MP434"),
    "partial rollout": (lambda plan: with_task(plan, "rollout", partial=True), "MP436"),
    "over-sampling": (lambda plan: with_task(plan, "rollout", keep_prompts=2), "MP436"),
    "speculation": (lambda plan: with_task(plan, "rollout", speculation=SPECULATION), "MP436"),
    "critic": (lambda plan: with_task(plan, "train", model="critic"), "MP436"),
    "optimizer offload": (lambda plan: with_task(plan, "train", optimizer_offload=True), "MP436"),
    "teacher": (lambda plan: with_task(plan, "old_log_probs", model="teacher"), "MP436"),
    "gae": (lambda plan: with_task(plan, "advantage", estimator="gae"), "MP436"),
    "nccl": (lambda plan: with_task(plan, "sync", transport="nccl_broadcast"), "MP436"),
    "samples of earlier iterations": (
        lambda plan: replace(
            plan,
            graph=replace(
                plan.graph,
                edges=tuple(replace(edge, distance=1) if edge.carries == "rewards" else edge for edge in plan.graph.edges),
            ),
        ),
        "MP435",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_cannot_run_is_refused_by_name(case: str) -> None:
    change, code = UNSUPPORTED[case]
    assert code in [finding.code for finding in unsupported(change(tiny_plan()))]


def test_what_can_run_is_not() -> None:
    assert unsupported(tiny_plan()) == []
    assert unsupported(tiny_plan(colocated=False, distance=3)) == []


def test_a_checkpoint_of_another_model_is_refused(directory: RunDirectory, tmp_path: Path) -> None:
    initialise_checkpoint(MOE, tmp_path / "model", 0)
    other = {**MOE, "moe_intermediate_size": 2 * MOE["moe_intermediate_size"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(other))
    plan = tiny_plan(warm=0, model=ModelSource(name="m", checkpoint=str(tmp_path / "model")))
    findings = preflight(plan, directory)
    assert {finding.code for finding in findings} == {"MP437"}
    assert "mlp.experts" in findings[0].message


def test_gpus_that_are_not_there_are_missed_before_ray_starts(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    plan = replace(tiny_plan(colocated=False, warm=0), cluster=replace(H200, nodes=1, gpus_per_node=2))
    (finding,) = preflight(plan, directory)
    assert finding.code == "MP422"
    assert "uses 2 GPUs (h200), this machine shows 1" in finding.message


SGLANG = {
    "pipeline stages": ({"pp": 2}, {}, "MP442"),
    "speculation": ({}, {"speculation": SPECULATION}, "MP436"),
}


@pytest.mark.parametrize("case", SGLANG)
def test_what_sglang_cannot_do_is_refused_by_name(case: str) -> None:
    sizes, task, code = SGLANG[case]
    plan = with_group(tiny_plan(), "rollout", engine="sglang", rollout_layout=RolloutLayout(**sizes))
    assert code in [finding.code for finding in unsupported(with_task(plan, "rollout", **task))]


def test_sglang_beside_the_embedded_trainer_can_run() -> None:
    assert unsupported(with_group(tiny_plan(), "rollout", engine="sglang")) == []


def test_only_the_newest_weights_go_from_gpu_to_gpu() -> None:
    plan = with_group(tiny_plan(colocated=False, distance=2), "rollout", engine="sglang")
    findings = unsupported(with_task(plan, "sync", transport="nccl_broadcast"))
    assert any("only the newest can be sent" in finding.message for finding in findings)
    assert any("the embedded trainer has no other" in finding.message for finding in findings)


def test_every_bad_line_of_a_data_file_is_a_finding_with_its_place(directory: RunDirectory, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+1="}\nnot json\n')
    plan = tiny_plan(data=tuple(DataSource(name=n, path=str(path)) for n in ("data.prompts", "evaluation.prompts")), warm=0)
    findings = preflight(plan, directory)
    assert [(finding.code, str(finding.location)) for finding in findings] == [
        ("MP440", f"{path}:2:1"),
        ("MP440", f"{path}:3:1"),
    ]


def test_a_missing_data_file_is_named(directory: RunDirectory, tmp_path: Path) -> None:
    plan = tiny_plan(data=(DataSource(name="data.prompts", path=str(tmp_path / "none.jsonl")),), warm=0)
    (finding,) = preflight(plan, directory)
    assert str(tmp_path / "none.jsonl") in str(finding.location)


@pytest.mark.parametrize(
    ("run", "code", "words"),
    [
        ({"tokenizer": TokenizerSource(kind="byte")}, "MP438", "258 tokens"),
        ({"tokenizer": TokenizerSource(kind="file", path="/no/such/tokenizer.json")}, "MP440", "cannot be read"),
        ({"model": ModelSource(name="m", checkpoint="/no/such/model")}, "MP437", "/no/such/model"),
        ({"data": (DataSource(name="data.prompts", generator="poetry"),)}, "MP439", "no generator 'poetry'"),
        ({"data": ()}, "MP439", "no data source 'data.prompts'"),
    ],
)
def test_what_a_run_reads_is_looked_at_first(directory: RunDirectory, run: dict[str, Any], code: str, words: str) -> None:
    findings = preflight(tiny_plan(warm=0, **run), directory)
    assert any(finding.code == code and words in finding.message for finding in findings), findings


def test_a_reward_that_is_not_there_is_a_finding(directory: RunDirectory) -> None:
    (finding,) = preflight(tiny_plan(reward="exact_macth", warm=0), directory)
    assert finding.code == "MP441"
    assert "exact_match" in finding.message


def test_a_checkpoint_folder_is_enough_of_a_model(directory: RunDirectory, tmp_path: Path) -> None:
    initialise_checkpoint(MOE, tmp_path / "model", 0)
    plan = tiny_plan(warm=0, model=ModelSource(name="m", checkpoint=str(tmp_path / "model")))
    assert preflight(plan, directory) == []


@pytest.mark.parametrize(
    ("installed", "wanted", "fine"),
    [
        ("2.13.0+cpu", ">=2.8", True),
        ("2.8.0", ">=2.8", True),
        ("2.7.1", ">=2.8", False),
        ("2.10.0", ">=2.8", True),
        ("0.5.16", "0.5.16", True),
        ("0.5.17", "0.5.16", False),
    ],
)
def test_releases_are_compared_number_by_number(installed: str, wanted: str, fine: bool) -> None:
    assert satisfies(installed, wanted) is fine


def test_the_environment_of_a_plan_is_checked(directory: RunDirectory) -> None:
    needs = (("torch", ">=99"), ("no-such-package", ">=1"), ("env:MILES_PLAN_NO_SUCH_SETTING", "Ring"), ("numpy", ">=1.26"))
    findings = preflight(replace(tiny_plan(warm=0), environment=needs), directory)
    assert [finding.code for finding in findings] == ["MP424", "MP423", "MP424"]
    assert "MILES_PLAN_NO_SUCH_SETTING=Ring, it is not set" in findings[2].message


def node(**resources: float) -> dict[str, Any]:
    return {"Alive": True, "Resources": resources}


def test_a_plan_for_another_cluster_is_refused_before_anything_is_made() -> None:
    plan = tiny_plan(colocated=False)
    check_cluster(plan.cluster, plan.graph, [node(planned_gpu=2)])
    with pytest.raises(RunError, match=r"uses 2 GPUs \(cpu, 1 x 2\), this cluster has 1 on 1 node"):
        check_cluster(plan.cluster, plan.graph, [node(planned_gpu=1)])
    h200 = replace(H200, nodes=1, gpus_per_node=2)
    check_cluster(h200, plan.graph, [node(**{"GPU": 2, "accelerator_type:H200": 1})])
    with pytest.raises(RunError, match="for h200 GPUs, this cluster has A100"):
        check_cluster(h200, plan.graph, [node(**{"GPU": 2, "accelerator_type:A100": 1})])


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path) -> None:
    plan = with_group(tiny_plan(), "train", engine="megatron")
    root = tmp_path / "runs" / "first"
    with pytest.raises(PlanError):
        execute(plan, root)
    assert list(tmp_path.iterdir()) == []
    root.mkdir(parents=True)
    (root / "mine.txt").write_text("mine")
    with pytest.raises(PlanError):
        execute(plan, root)
    assert [path.name for path in root.iterdir()] == ["mine.txt"]
