"""docs/diagnostics.md: all pages, by range."""

from __future__ import annotations

from miles_plan.diagnostics.codes import PAGES, RANGES

_HEAD = """\
# Diagnostics

Every mistake that miles-plan finds has a code, and every code a page: what it means, why it is an error, an example, and how
to fix it. `miles-plan explain MP120` prints a page. This file is written by `pytest tests/diagnostics --update-golden` from
`miles_plan/diagnostics/pages_*.py`.

A finding looks like this; `--format concise | json | sarif | github` shows the same for other readers:

```text
error[MP120]: unknown key `temprature` in `rollout`
 --> spec.yaml:3:3
  |
3 |   temprature: 0.7
  |   ^^^^^^^^^^
  = help: did you mean `temperature`?
  |
3 -   temprature: 0.7
3 +   temperature: 0.7
```

Exit codes: 0 fine (there may be warnings), 1 diagnostics, 2 wrong usage or a bug of ours, 3 plans differ, 4 a run failed and
can be resumed, 5 a run failed and cannot, 130 interrupted.
"""


def markdown() -> str:
    """The whole document."""
    parts = [_HEAD]
    for prefix, title in RANGES.items():
        pages = [page for code, page in PAGES.items() if code.startswith(prefix)]
        if pages:
            parts.append(f"## {prefix}xx: {title}\n")
            parts += [page.markdown() for page in pages]
    return "\n".join(parts)
