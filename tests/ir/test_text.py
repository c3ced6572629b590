from __future__ import annotations

import pytest
from hypothesis import given, settings

from miles_plan.ir.graph import TaskGraph
from miles_plan.ir.text import TextError, parse, to_text
from tests.ir.graphs import graphs, grpo_graph


def test_a_graph_prints_one_task_a_line(golden) -> None:
    golden.check("ir/grpo.plan", to_text(grpo_graph()))


@given(graphs())
@settings(max_examples=150, deadline=None)
def test_text_parses_back_to_the_same_graph(graph: TaskGraph) -> None:
    assert parse(to_text(graph)) == graph


def test_comments_and_spacing_do_not_matter() -> None:
    text = to_text(grpo_graph())
    assert parse("# a title\n" + text.replace("  ", "\t ")) == grpo_graph()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('graph "g" [] {\n  %a = prompts(samples:b)\n}', "line 2, column 24"),
        ('graph "g" [] {\n  loop rl iterations=\n}', "line 3, column 1"),
        ('graph "g" [logical', "expected a name"),
        ("graph ~", "line 1, column 6"),
    ],
)
def test_a_syntax_error_names_its_place(text: str, place: str) -> None:
    with pytest.raises(TextError, match=place):
        parse(text)


def test_an_unknown_task_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="teleport"):
        parse('graph "g" [] {\n  %a = teleport() loop="rl"\n}')
