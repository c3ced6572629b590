"""Rewards by name: built in, or `package.module:function`. Looking one up reads files and runs none of their code."""

from __future__ import annotations

import ast
import hashlib
import importlib
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from miles_plan.diagnostics.nearest import nearest
from miles_plan.rewards.outcome import RewardFunction

BUILT_IN: Mapping[str, str] = {
    "exact_match": "miles_plan.rewards.exact_match:exact_match",
    "math": "miles_plan.rewards.math_verifier:math",
}


class RewardError(ValueError):
    """A reward cannot be found or loaded: the message names it, its file where there is one, and near names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedReward:
    """A reward that exists. name: as the spec has it; file and sha256: its source, empty for modules without one."""

    name: str
    module: str
    function: str
    built_in: bool
    file: str
    sha256: str


def locate(name: str, search_path: Sequence[str] = ()) -> LocatedReward:
    """Find a reward's module on `search_path` and sys.path, and its function in the source, executing neither.

    RewardError: no such built-in, module or function, or a source that does not parse.
    """
    if ":" not in name:
        if name not in BUILT_IN:
            raise RewardError(
                f"no built-in reward '{name}'{_near(name, BUILT_IN)}; a reward of your own is package.module:function"
            )
        return _located(name, BUILT_IN[name], ())
    return _located(name, name, search_path)


def load_built_in(reward: LocatedReward) -> RewardFunction:
    """The function of a built-in reward, which may run in this process. ValueError for one that is not built in."""
    if not reward.built_in:
        raise ValueError(f"{reward.name} is the user's: it runs in a worker")
    function: RewardFunction = getattr(importlib.import_module(reward.module), reward.function)
    return function


def _located(name: str, entry_point: str, search_path: Sequence[str]) -> LocatedReward:
    module, _, function = entry_point.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise RewardError(f"'{name}' is no entry point; write package.module:function")
    spec = _find_module(module, [*search_path, *sys.path])
    source = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    content = b"" if source is None else _read(source)
    if source is not None:
        _require_function(content, source, function)
    return LocatedReward(
        name=name,
        module=module,
        function=function,
        built_in=name in BUILT_IN,
        file=spec.origin or "",
        sha256=hashlib.sha256(content).hexdigest() if content else "",
    )


def _find_module(module: str, path: Sequence[str]) -> ModuleSpec:
    """The spec of a dotted module, found package by package: importlib.util.find_spec would import the parents."""
    found, directories = "", list(path)
    spec: ModuleSpec | None = None
    for part in module.split("."):
        spec = _find_part(part, directories, top=not found)
        if spec is None:
            what = f"package '{found}'" if found else "this machine"
            near = _near(part, _module_names(directories))
            raise RewardError(f"no module '{part}' in {what}{near} (looked for '{module}')")
        found = f"{found}.{part}" if found else part
        directories = list(spec.submodule_search_locations or ())
    assert spec is not None
    if spec.origin is None and spec.loader is None:
        raise RewardError(f"'{module}' is a folder without a module in it")
    return spec


def _find_part(part: str, directories: list[str], *, top: bool) -> ModuleSpec | None:
    found = PathFinder.find_spec(part, directories)
    if found is None and top:
        # Built-in modules, and packages that an editable install puts behind a finder of its own.
        finders = [finder for finder in sys.meta_path if finder is not PathFinder]
        found = next((spec for finder in finders if (spec := finder.find_spec(part, None)) is not None), None)
    return found


def _module_names(directories: Iterable[str]) -> set[str]:
    return {module.name for module in pkgutil.iter_modules(list(directories))}


def _read(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as error:
        raise RewardError(f"{source}: cannot be read: {error.strerror or error}") from error


def _require_function(content: bytes, source: Path, function: str) -> None:
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise RewardError(f"{source}{line}: does not parse: {getattr(error, 'msg', None) or error}") from error
    names = set(_top_level_names(tree.body))
    # `from x import *` and a module's own __getattr__ may bring the name; only running the module would tell.
    if not names & {function, "*", "__getattr__"}:
        raise RewardError(f"{source}: has no '{function}'{_near(function, names)}")


def _top_level_names(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Names that running a module's statements may bind, those inside if, try and with included."""
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name.partition(".")[0] for alias in names)
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                yield from (
                    node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                )
            case _:
                for part in ("body", "orelse", "finalbody"):
                    yield from _top_level_names(getattr(statement, part, []))
                for handler in getattr(statement, "handlers", []):
                    yield from _top_level_names(handler.body)


def _near(name: str, choices: Iterable[str]) -> str:
    close = nearest(name, set(choices))
    return f"; did you mean '{close}'?" if close else ""
