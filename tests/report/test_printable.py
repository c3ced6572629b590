from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from miles_plan.report.printable import printable, printable_lines


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert printable("a\x1b[31mb") == "a\\x1b[31mb"
    assert printable("left\u202eright") == "left\\u202eright"
    assert printable("two\nlines") == "two\\nlines"
    assert printable_lines("two\nli\x07nes") == "two\nli\\x07nes"
    assert printable("größe 模型") == "größe 模型"


@given(st.text())
def test_the_result_is_always_printable(text: str) -> None:
    assert printable(text).isprintable()
