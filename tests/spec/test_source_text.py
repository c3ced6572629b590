from __future__ import annotations

import os
from pathlib import Path

import pytest

from miles_plan.diagnostics import Diagnostic
from miles_plan.spec.limits import MAX_FILE_BYTES
from miles_plan.spec.source_text import decode, read_source


def refused(result: str | Diagnostic) -> Diagnostic:
    assert isinstance(result, Diagnostic)
    return result


def test_a_byte_order_mark_is_dropped() -> None:
    assert decode(b"\xef\xbb\xbfa: 1", "f") == "a: 1"


@pytest.mark.parametrize(
    ("raw", "line", "column"),
    [
        (b"a: 1\nb: \xff", 2, 4),
        ("é: ".encode() + b"\xc3", 1, 4),
        (b"a: \x00", 1, 4),
        (b"a: 1\r\nb: \x1b[31m", 2, 4),
        ("a: \ufffe".encode(), 1, 4),
        (b"\xff\xfea\x00", 1, 1),
        (b"\x00\x00\xfe\xff", 1, 1),
        (b"\xed\xa0\x80", 1, 1),  # a lone surrogate
    ],
)
def test_what_is_no_utf8_text_is_refused_at_its_place(raw: bytes, line: int, column: int) -> None:
    finding = refused(decode(raw, "f"))
    assert finding.code == "MP102"
    assert finding.location is not None
    assert (finding.location.line, finding.location.column) == (line, column)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("")
    finding = refused(read_source(tmp_path / "quikstart.yaml", "quikstart.yaml"))
    assert finding.code == "MP101"
    assert "quickstart.yaml" in finding.help


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert refused(read_source(tmp_path, "x")).code == "MP101"


def test_a_pipe_without_writer_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refused(read_source(tmp_path / "pipe", "pipe")).code == "MP101"


def test_a_nul_or_endless_name_is_refused() -> None:
    assert refused(read_source(Path("a\0b"), "a\0b")).code == "MP101"
    assert refused(read_source(Path("x" * 10_000), "x")).code == "MP101"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.yaml"
    path.write_text("a: 1")
    path.chmod(0)
    assert refused(read_source(path, "secret.yaml")).code == "MP101"


def test_only_so_much_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"#" * MAX_FILE_BYTES)
    assert isinstance(read_source(path, "large.yaml"), str)
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    assert refused(read_source(path, "large.yaml")).code == "MP103"
    assert refused(read_source(Path("/dev/zero"), "/dev/zero")).code == "MP101"
