"""Look a function up by its entry point `package.module:function` without importing anything: `check` runs no user code."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

Verdict = Literal["found", "no module", "no function"]
_LARGEST_MODULE_BYTES = 4 << 20


def look_up(entry_point: str, directories: Iterable[Path]) -> Verdict:
    """Whether the function's module lies in `directories` or on the path, and names the function at its top level.

    A module that cannot be read as Python source (compiled, too large, generated names through `import *`) counts as found.
    """
    module, _, function = entry_point.partition(":")
    for directory in [*directories, *(Path(each) for each in sys.path if each)]:
        source = _source_of(directory, module.split("."))
        if source is not None:
            return "found" if _may_define(source, function) else "no function"
    return "no module"


def _source_of(directory: Path, steps: list[str]) -> Path | None:
    base = directory.joinpath(*steps)
    candidates = (base.with_suffix(".py"), base / "__init__.py", *directory.joinpath(*steps[:-1]).glob(f"{steps[-1]}.*.so"))
    return next((each for each in candidates if each.is_file()), None)


def _may_define(source: Path, function: str) -> bool:
    try:
        if source.suffix != ".py" or source.stat().st_size > _LARGEST_MODULE_BYTES:
            return True
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    names = {name for statement in ast.walk(tree) for name in _names(statement)}
    return function in names or "*" in names


def _names(statement: ast.AST) -> Iterable[str]:
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return [alias.asname or alias.name for alias in names]
        case ast.Name(id=name, ctx=ast.Store()):
            return [name]
        case _:
            return []
