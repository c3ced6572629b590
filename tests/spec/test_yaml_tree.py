from __future__ import annotations

import time

import pytest

from miles_plan.spec.limits import MAX_DEPTH, MAX_NODES
from miles_plan.spec.tree import MapNode, find, key_location, to_data, value_location
from miles_plan.spec.yaml_tree import parse_yaml


def codes(text: str) -> list[str]:
    return [finding.code for finding in parse_yaml(text, "f.yaml").findings]


def data(text: str) -> object:
    parsed = parse_yaml(text, "f.yaml")
    assert not parsed.findings
    assert parsed.root is not None
    return to_data(parsed.root)


def test_values_and_their_places() -> None:
    text = "a: 1\nb:\n  c: [x, 'y y', {d: 2.5}]\n"
    parsed = parse_yaml(text, "f.yaml")
    assert isinstance(parsed.root, MapNode)
    assert to_data(parsed.root) == {"a": 1, "b": {"c": ["x", "y y", {"d": 2.5}]}}
    lines = text.splitlines()

    def spelt(path: tuple[str, ...]) -> str:
        place = value_location(parsed.root, path)  # type: ignore[arg-type]
        assert place is not None
        return lines[place.line - 1][place.column - 1 : place.end_column - 1]

    assert spelt(("a",)) == "1"
    assert spelt(("b", "c", "1")) == "'y y'"
    assert spelt(("b", "c", "2", "d")) == "2.5"
    assert spelt(("b", "c")) == "[x, 'y y', {d: 2.5}]"
    assert spelt(("b",)) == "b", "a mapping over several lines is pointed at by its key"
    key = key_location(parsed.root, ("b", "c", "2", "d"))
    assert key is not None
    assert (key.line, key.column, key.end_column) == (3, 18, 19)


def test_columns_count_characters_not_bytes() -> None:
    parsed = parse_yaml("é: 漢字\n", "f.yaml")
    assert parsed.root is not None
    place = value_location(parsed.root, ("é",))
    assert place is not None
    assert (place.column, place.end_column) == (4, 6)


def test_a_fragment_is_placed_inside_the_larger_text() -> None:
    parsed = parse_yaml("[a, {b: 1}]", "--set", line=3, column=10)
    assert parsed.root is not None
    place = value_location(parsed.root, ("1", "b"))
    assert place is not None
    assert (place.line, place.column) == (3, 10 + 8)


def test_quoted_words_are_text() -> None:
    assert data("a: '1'\nb: \"true\"\nc: |\n  8\nd: 1\n") == {"a": "1", "b": "true", "c": "8\n", "d": 1}


def test_aliases_stand_for_whole_values() -> None:
    assert data("a: &x {k: [1]}\nb: *x\n") == {"a": {"k": [1]}, "b": {"k": [1]}}


def test_an_anchor_may_be_defined_again() -> None:
    assert data("a: &x 1\nb: &x 2\nc: *x\n") == {"a": 1, "b": 2, "c": 2}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a: 1\na: 2", "MP111"),
        ("a: {b: 1, 'b': 2}", "MP111"),
        ("a: &x [*x]", "MP113"),
        ("a: &x {b: {c: *x}}", "MP113"),
        ("a: *nowhere", "MP113"),
        ("a: !!python/object/apply:os.system [ls]", "MP112"),
        ("a: !!int 3", "MP112"),
        ("a: !local x", "MP112"),
        ("a: ! x", "MP112"),
        ("a: &d {b: 1}\nc: {<<: *d}", "MP112"),
        ("%YAML 1.1\n---\na: 1", "MP112"),
        ("a: 1\n---\nb: 1", "MP112"),
        ("? [a, b]\n: 1", "MP112"),
        ("? {a: 1}\n: 1", "MP112"),
        ("a: &x 1\n*x : 2", "MP112"),
        ("a: [1", "MP110"),
        ("a:\n\tb: 1", "MP110"),
        ("a: 'x", "MP110"),
        ("[" * (MAX_DEPTH + 1), "MP103"),
    ],
)
def test_refused_with_a_place(text: str, code: str) -> None:
    findings = parse_yaml(text, "f.yaml").findings
    assert code in [each.code for each in findings]
    assert all(each.location is not None and each.location.line >= 1 and each.location.column >= 1 for each in findings)


def test_all_mistakes_of_a_document_are_told_at_once() -> None:
    assert codes("a: !x 1\na: 2\nb: {<<: 1}\nb: 3\n") == ["MP112", "MP111", "MP112", "MP111"]


def test_a_place_behind_the_end_is_moved_to_the_end() -> None:
    (finding,) = parse_yaml("a: 'x\nb: 1\n", "f.yaml").findings
    assert finding.location is not None
    assert finding.location.line == 2


def test_depth_counts_through_aliases() -> None:
    nested = "[" * 40 + "x" + "]" * 40
    assert codes(f"a: &a {nested}\nb: {nested}") == []
    assert codes(f"a: &a {nested}\nb: {nested.replace('x', '*a')}") == ["MP103"]


def alias_chain(factor: int, levels: int) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * factor)}]" for i in range(1, levels)]
    return "\n".join(lines)


BOMBS = {
    "alias bomb": alias_chain(10, 12),
    "wide alias bomb": alias_chain(1000, 4),
    "deep flow lists": "[" * 100_000,
    "deep flow maps": "{a: " * 100_000,
    "deep block lists": "- " * 100_000,
    "deep block maps": "? " * 100_000,
    "a million keys": "\n".join(f"k{i}: 1" for i in range(100_000)),
    "unknown keys": "".join(f"key_{i}: 1\n" for i in range(45_000)),
    "duplicate keys": "a: 1\n" * 200_000,
    "flow list": "[" + "1," * 500_000 + "]",
    "empty lists": "[" + "[]," * 300_000 + "]",
    "tags": "- !a b\n" * 100_000,
    "anchors": "&a " * 300_000,
    "stars": "*" * 1_000_000,
    "exclamations": "!" * 1_000_000,
    "percents": "%" * 1_000_000,
    "colons": ":" * 1_000_000,
    "quotes": "'" * 1_000_000,
    "escapes": '"' + "\\x41" * 250_000,
    "spaces": " " * 1_000_000 + "x: 1",
    "newlines": "\n" * 1_000_000,
    "one long word": "a: " + "x" * 1_000_000,
    "one long key": "x" * 1_000_000 + ": 1",
    "long digits": "a: " + "9" * 1_000_000,
    "long exponent": "a: 1e" + "9" * 1_000_000,
    "block scalar": "a: |\n" + " x\n" * 300_000,
    "question marks": "{" + "?" * 1_000_000,
    "commas": "[" + "," * 1_000_000,
    "documents": "---\n" * 250_000,
    "comments": "#\n" * 500_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_or_read_quickly(name: str) -> None:
    """Never an exception, never a wait. What `check` needs for them in memory: tests/cli/test_check.py."""
    start = time.process_time()
    parse_yaml(BOMBS[name], "f.yaml")
    assert time.process_time() - start < 3.0  # under 1 s on an idle core; these machines are shared


def test_the_value_count_is_that_after_expansion() -> None:
    items = ", ".join(["x"] * 999)
    text = f"a: &a [{items}]\n" + "\n".join(f"b{i}: *a" for i in range(98))
    assert codes(text) == []
    assert codes(text + "\n" + "\n".join(f"c{i}: *a" for i in range(3))) == ["MP103"]
    assert MAX_NODES == 100_000


def test_find_answers_none_for_what_is_not_there() -> None:
    parsed = parse_yaml("a: [1]\nb: 2", "f.yaml")
    assert parsed.root is not None
    for path in (("c",), ("a", "1"), ("a", "x"), ("a", "-1"), ("b", "c"), ("a", "0", "0"), ("a", "9" * 30)):
        assert find(parsed.root, path) is None
