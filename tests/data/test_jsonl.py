import json
import os
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.data.jsonl import FieldProblem, LineError, column_of_field, index_jsonl, parse_line
from miles_plan.data.problem import DataError


def no_check(row):
    return iter(())


def places(error: DataError) -> list[tuple[int, int]]:
    return [(problem.line, problem.column) for problem in error.problems]


def problems_of(path: Path, content: bytes, check=no_check) -> DataError:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        index_jsonl(path, check)
    return caught.value


def test_rows_are_read_back_by_number_in_any_order(tmp_path):
    rows = [{"i": i, "text": "é" * i} for i in range(50)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")  # no newline at the end
    file = index_jsonl(path, no_check)
    assert len(file) == 50
    assert file.read([49, 0, 7, 7]) == [rows[49], rows[0], rows[7], rows[7]]


def test_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\r\n{"a": 2}\r\n')
    assert index_jsonl(path, no_check).read([1]) == [{"a": 2}]


@pytest.mark.parametrize(
    ("line", "column", "message"),
    [
        (b'{"a": 1', 8, "not JSON"),
        (b'{"a": 1}}', 9, "not JSON: Extra data"),
        (b"{'a': 1}", 2, "not JSON"),
        (b"[1, 2]", 1, "expected a JSON object, found an array"),
        (b'"text"', 1, "expected a JSON object, found a string"),
        (b"null", 1, "found null"),
        (b"", 1, "the line is empty"),
        (b'{"a": "\xff"}', 8, "not UTF-8: byte 0xff"),
        ('{"é": "'.encode() + b'\x80"}', 8, "not UTF-8: byte 0x80"),  # columns count characters, not bytes
        (b'\xef\xbb\xbf{"a": 1}', 1, "byte order mark"),
        (b'{"a": NaN}', 1, "NaN is not JSON"),
        (b'{"a": -Infinity}', 1, "-Infinity is not JSON"),
        (b'{"a": 1e999}', 1, "too large"),
        (b'{"a": 1, "a": 2}', 1, "the key 'a' appears twice"),
        (b'{"b": {"a": 1, "a": 2}}', 1, "the key 'a' appears twice"),
        (b'{"a": ' + b"[" * 100_000 + b"}", 1, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", 1, "integer string conversion"),
        (b'{"a": "tab\there"}', 11, "Invalid control character"),
    ],
)
def test_a_bad_line_is_reported_with_its_number_and_column(tmp_path, line, column, message):
    error = problems_of(tmp_path / "rows.jsonl", b'{"good": 1}\n' + line + b'\n{"good": 2}\n')
    assert places(error) == [(2, column)]
    assert message in error.problems[0].message
    assert str(error).startswith(f"{tmp_path}/rows.jsonl:2:{column}: ")


def test_twenty_findings_are_listed_and_all_are_counted(tmp_path):
    error = problems_of(tmp_path / "rows.jsonl", b"bad\n" * 35 + b'{"good": 1}\n')
    assert len(error.problems) == 20
    assert error.total == 35
    assert [problem.line for problem in error.problems] == list(range(1, 21))
    assert str(error).endswith("and 15 more")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.problems, copy.total, str(copy)) == (error.problems, error.total, str(error))


def test_field_findings_point_at_the_value(tmp_path):
    def check(row):
        yield FieldProblem("b", "wrong")
        yield FieldProblem(None, "missing")

    error = problems_of(tmp_path / "rows.jsonl", b'{"a": {"b": 1}, "b": 2}\n', check)
    assert places(error) == [(1, 22), (1, 1)]


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.recursive(st.integers() | st.text(), st.lists, max_leaves=4), min_size=1), st.data())
def test_column_of_field_is_where_the_value_begins(row, data):
    name = data.draw(st.sampled_from(sorted(row)))
    line = json.dumps(row, separators=data.draw(st.sampled_from([(", ", ": "), (",", ":"), (" , ", " : ")])))
    rest = line[column_of_field(line, name) - 1 :]
    assert json.JSONDecoder().raw_decode(rest)[0] == row[name]
    assert column_of_field(line, "no such key" * 9) == 1


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_make_the_parser_raise_anything_else(line):
    with suppress(LineError):
        assert isinstance(parse_line(line), dict)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.jsonl")  # must not block
    for name, message in [
        ("missing.jsonl", "cannot be read: No such file or directory"),
        (".", "is a directory"),
        ("empty.jsonl", "the file is empty"),
        ("pipe.jsonl", "is not a regular file"),
        ("empty.jsonl/inside", "cannot be read: Not a directory"),
    ]:
        with pytest.raises(DataError) as caught:
            index_jsonl(tmp_path / name, no_check)
        assert caught.value.problems[0].path == str(tmp_path / name)
        assert message in str(caught.value)
        assert places(caught.value) == [(0, 0)]
    with pytest.raises(DataError, match="is no path"):
        index_jsonl("a\0b", no_check)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "secret.jsonl"
    path.write_text("{}\n")
    path.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        index_jsonl(path, no_check)


def test_a_file_changed_after_indexing_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n')
    file = index_jsonl(path, no_check)
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n')
    with pytest.raises(DataError, match="changed since it was indexed"):
        file.read([0])
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        file.read([0])


def test_one_endless_line_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("miles_plan.data.jsonl.MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "model.bin"
    path.write_bytes(b"x" * (3 << 20))
    with pytest.raises(DataError, match="has a line longer than 1 MiB"):
        index_jsonl(path, no_check)


def test_the_index_of_many_lines_is_small(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "1+1=", "answer": "2"}\n' * 20_000)
    file = index_jsonl(path, no_check)
    assert file.offsets.nbytes == 8 * 20_001
