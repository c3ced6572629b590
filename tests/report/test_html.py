from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from miles_plan.ir.plan import Plan, to_json, write_plan
from miles_plan.report.html import plan_html, run_html, write_plan_report, write_run_report
from miles_plan.report.run_files import read_run
from tests.report.sample_run import RunWriter

VOID = {"meta", "br", "link", "img", "input", "hr"}
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """A page taken apart: tags with their attributes, text, and whether every tag is closed by its own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return "".join(self.words)


@pytest.fixture(scope="session")
def run_page(tmp_path_factory: pytest.TempPathFactory, embedded_plan: Plan) -> str:
    return run_html(read_run(RunWriter(embedded_plan).write(tmp_path_factory.mktemp("runs") / "run")))


def assert_sound(text: str) -> Page:
    """Well-formed, self-contained, reachable by keyboard and reader."""
    page = Page(text)
    assert page.open == []
    ids = [value for _, attributes in page.tags if (value := attributes.get("id"))]
    assert len(ids) == len(set(ids))
    for link in page.of("a"):
        href = link["href"] or ""
        assert href[1:] in ids if href.startswith("#") else href.startswith("./"), href
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in page.of("svg"))
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.of("th"))
    assert page.of("html") == [{"lang": "en"}]
    return page


def assert_offline(text: str) -> None:
    """Nothing in the page names another place, and the browser is told to refuse one."""
    assert not re.search(r"https?:|//[a-z]|url\(|@import|src=|<link|<iframe|<object|<base", text, re.IGNORECASE)
    assert "default-src 'none'" in text


def test_the_page_of_a_plan_is_sound_and_offline(any_plan: Plan) -> None:
    text = plan_html(any_plan)
    assert_sound(text)
    assert_offline(text)


def test_the_page_of_a_run_is_sound_and_offline(run_page: str) -> None:
    assert_sound(run_page)
    assert_offline(run_page)


def test_only_our_script_may_run(run_page: str) -> None:
    script = re.findall(r"<script>(.*?)</script>", run_page, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in run_page


def test_a_plan_of_a_thousand_gpus_stays_small(moe_plan: Plan, tmp_path: Path) -> None:
    write_plan_report(moe_plan, tmp_path / "plan.html")
    assert (tmp_path / "plan.html").stat().st_size < 300_000
    run = RunWriter(moe_plan).write(tmp_path / "run", rl_iterations=1000)
    assert write_run_report(run).stat().st_size < 1_000_000


def test_the_same_plan_gives_the_same_page(moe_plan: Plan) -> None:
    assert plan_html(moe_plan) == plan_html(moe_plan)


def test_a_big_plan_is_complete(moe_plan: Plan) -> None:
    text = Page(plan_html(moe_plan)).text
    for task in moe_plan.graph.tasks:
        assert text.count(task.name) >= 4, f"{task.name}: group, chart, table of tasks, failures"
    for decision in moe_plan.decisions:
        assert decision.reason in text
        assert all(other.value in text and other.why_not in text for other in decision.alternatives)
    for timeline in moe_plan.graph.memory:
        for phase in timeline.phases:
            assert phase.name in text
            assert all(term.name.replace("_", " ") in text for term in phase.terms)
    expected = [each.pattern for each in moe_plan.transfers] + [each.op for each in moe_plan.numerics]
    expected += [each.name for each in moe_plan.estimates] + [each.rollout_layout for each in moe_plan.candidates]
    expected += [moe_plan.diagnostics[0]["message"], *moe_plan.unread_fields, *(name for name, _ in moe_plan.environment)]
    assert [words for words in expected if words not in text] == []


def test_hostile_names_stay_text_everywhere_in_a_plan(any_plan: Plan) -> None:
    hostile = hostile_plan(any_plan)
    assert sum(EVIL in leaf for leaf in strings(to_json(hostile)["plan"])) > 150
    assert_harmless(plan_html(hostile))


def test_hostile_names_stay_text_everywhere_in_a_run(embedded_plan: Plan, tmp_path: Path) -> None:
    run = RunWriter(hostile_plan(embedded_plan)).write(tmp_path / "run")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"loop": f"rl{EVIL}", "iteration": 0, f"figure{EVIL}": 1.0}) + "\n")
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time_s": 1, "kind": EVIL, "owner": EVIL, "subject": EVIL, EVIL: EVIL}) + "\n")
    (run / "summary.json").write_text(json.dumps({"final_weights_sha256": EVIL}), encoding="utf-8")
    (run / "javascript:alert(1)").write_text("", encoding="utf-8")
    (run / "<b onclick=x>&.txt").write_text("", encoding="utf-8")
    text = run_html(read_run(run))
    assert_harmless(text)
    assert 'href="./javascript%3Aalert%281%29"' in text
    assert 'href="./%3Cb%20onclick%3Dx%3E%26.txt"' in text


def assert_harmless(text: str) -> None:
    page = assert_sound(text)
    assert len(page.of("script")) == 1
    assert page.of("img") == []
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert EVIL in page.text


def hostile_plan(plan: Plan) -> Plan:
    """The plan with EVIL at the end of every string that may be any string; what refers to each other still does."""
    body = to_json(plan)["plan"]
    changed = _with_evil(body)
    try:
        return TypeAdapter(Plan).validate_python(changed)
    except ValidationError as error:
        for each in error.errors():
            location = [step for step in each["loc"] if not (isinstance(step, str) and step in KINDS)]
            _restore(changed, body, location)
    return TypeAdapter(Plan).validate_python(changed)


KINDS = {
    "prompts", "rollout", "reward", "filter_groups", "record_routing", "replay_routing", "logprobs", "values", "advantage",
    "correct", "buffer", "train_step", "draft_step", "quantize", "weight_sync", "offload", "onload", "checkpoint", "evaluate",
}  # fmt: skip


def _with_evil(value: Any, field: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _with_evil(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_evil(item, field) for item in value]
    literal = field in ("kind", "place", "facts", "carries", "role", "engine")
    return value if literal or not isinstance(value, str) else value + EVIL


def _restore(changed: Any, body: Any, location: list[Any]) -> None:
    for step in location[:-1]:
        changed, body = changed[step], body[step]
    changed[location[-1]] = body[location[-1]]


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(item)


def test_control_characters_are_written_out(embedded_plan: Plan) -> None:
    text = plan_html(replace(embedded_plan, name="a\x00b\u202ec"))
    assert "a\\x00b\\u202ec" in text
    assert "\x00" not in text
    assert "\u202e" not in text


def test_exact_zeros_are_shown_as_such(run_page: str) -> None:
    text = Page(run_page).text
    assert "exactly 0 in all 60 iterations, 67,267 tokens compared" in text
    assert "exactly 0 in all 60 iterations" in text


def test_a_difference_that_is_not_zero_gets_a_curve(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"loop": "rl", "iteration": 60, "max_abs_log_prob_diff": 2.5e-7, "tokens_compared": 9}\n')
    text = run_html(read_run(run_dir))
    assert "2.5e-07 nats" in Page(text).text
    assert "log-prob diff of loop rl over 61 iterations, last 2.5e-7 nats" in text
    assert "exactly 0 in all 60 iterations, 67" not in text


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path, embedded_plan: Plan) -> None:
    write_plan(embedded_plan, tmp_path / "plan.json")
    path = write_run_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = assert_sound(path.read_text(encoding="utf-8"))
    assert "not finished" in page.text
    assert "Curves" not in page.text


def test_planned_and_measured_stand_side_by_side(run_page: str) -> None:
    page = Page(run_page)
    assert "724 of 726 task runs took a time inside the planned interval. 1 run repeated." in page.text
    assert "Iteration 2, of median duration" in page.text
    assert "task failed, rollout@23: actor died: signal 9 (attempt=0)" in page.text
    names = [file for file in ("plan.json", "metrics.jsonl", "checkpoints/") if f'href="./{file}"' in run_page]
    assert len(names) == 3


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, embedded_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.html"
    path.write_text("old", encoding="utf-8")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_plan_report(embedded_plan, path)
    assert [each.name for each in tmp_path.iterdir()] == ["plan.html"]
    assert path.read_text(encoding="utf-8") == "old"
