from __future__ import annotations

import re
from pathlib import Path

from miles_plan.spec import load_job
from miles_plan.spec.book import markdown
from miles_plan.spec.fields import all_fields
from tests.conftest import Golden
from tests.spec.example import write


def test_the_document_is_the_fields(golden: Golden) -> None:
    golden.check("../../docs/spec.md", markdown())


def test_every_field_is_in_it() -> None:
    text = markdown()
    for path, entry in all_fields().items():
        assert f"| `{path.rpartition('.')[2]}` |" in text
        assert entry.meaning.replace("|", "\\|") in text


def test_its_example_is_a_job(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(version: 1\n.*?)```", markdown(), flags=re.DOTALL)
    load_job(write(tmp_path, example))
