"""`miles-plan schema`: JSON Schema of the spec, for completion and checks in editors."""

from __future__ import annotations

import json
import sys


def schema() -> None:
    """Print the JSON Schema of the job spec.

    Editors use it for completion: save it and name it in a spec's first line,
    `# yaml-language-server: $schema=miles-plan.schema.json`.
    """
    from miles_plan.spec.schema import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n")
