"""What a valid spec names and whether it exists: models, GPUs, files, rewards. `check` asks; loading a spec does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from miles_plan.catalog.gpus import find_gpu, gpu_names
from miles_plan.catalog.hf_config import architecture_from_hf_config
from miles_plan.catalog.models import find_model, model_aliases, model_names
from miles_plan.diagnostics import Diagnostic, error, excerpt, nearest, warning
from miles_plan.spec.entry_points import look_up
from miles_plan.spec.fields import all_fields, pattern_of
from miles_plan.spec.load import LoadedJob
from miles_plan.spec.model import ModelSpec
from miles_plan.spec.section import leaves
from miles_plan.spec.types import BUILT_IN_REWARDS, PathMark

LARGEST_CONFIG_BYTES = 16 << 20


def named_things(loaded: LoadedJob) -> Iterator[Diagnostic]:
    """Everything the spec names that does not exist or cannot be used."""
    for path, value, _ in leaves(loaded.spec):
        mark = all_fields()[pattern_of(path)].kind.path
        if mark is not None and isinstance(value, str):
            yield from _file(loaded, path, value, mark)
    for place, model in _models(loaded):
        yield from _model(loaded, place, model)
    yield from _gpus(loaded)
    yield from _reward(loaded)


def _file(loaded: LoadedJob, path: str, name: str, mark: PathMark) -> Iterator[Diagnostic]:
    found = loaded.file(name)
    exists = {"file": found.is_file, "directory": found.is_dir, "any": found.exists}
    if _holds(exists[mark.kind]):
        return
    there = _holds(found.exists)
    wanted = {"file": "a file", "directory": "a directory", "any": "a file or directory"}[mark.kind]
    shown = excerpt(name, 200)
    message = f"`{shown}` is not {wanted}" if there else f"no file or directory `{shown}`"
    help = "" if there or found == Path(name) else f"looked for `{excerpt(str(found), 200)}`, relative to the spec file"
    yield error("MP142", message, loaded.at(path), field=path, help=help)


def _holds(test: Callable[[], bool]) -> bool:
    """A path that the system refuses to look at (too long, no permission) does not exist for us."""
    try:
        return test()
    except (OSError, ValueError):
        return False


def _models(loaded: LoadedJob) -> Iterator[tuple[str, ModelSpec]]:
    yield "model", loaded.spec.model
    if loaded.spec.algorithm.teacher is not None:
        yield "algorithm.teacher.model", loaded.spec.algorithm.teacher.model


def _model(loaded: LoadedJob, place: str, model: ModelSpec) -> Iterator[Diagnostic]:
    if model.name is not None:
        known = (*model_names(), *model_aliases())
        yield from _in_catalog(loaded, f"{place}.name", model.name, known, find_model, "MP140", "model")
    elif model.architecture is not None:
        yield from _config(loaded, f"{place}.architecture", lambda: model.architecture)
    elif model.hf_config is not None and _holds((file := loaded.file(model.hf_config)).is_file):
        yield from _config(loaded, f"{place}.hf_config", lambda: _read_json(file))
    elif model.checkpoint is not None and _holds((directory := loaded.file(model.checkpoint)).is_dir):
        yield from _checkpoint(loaded, f"{place}.checkpoint", directory)


def _checkpoint(loaded: LoadedJob, path: str, directory: Path) -> Iterator[Diagnostic]:
    config = directory / "config.json"
    if not _holds(config.is_file):
        yield error("MP142", f"`{directory}` has no config.json", loaded.at(path), field=path)
        return
    if not any(directory.glob("*.safetensors")):
        help = "weights are read from safetensors only; pickled ones (.bin, .pt) can run code"
        yield error("MP142", f"`{directory}` has no *.safetensors", loaded.at(path), field=path, help=help)
    yield from _config(loaded, path, lambda: _read_json(config))


def _config(loaded: LoadedJob, path: str, read: Callable[[], Any]) -> Iterator[Diagnostic]:
    try:
        config = read()
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping")
        architecture_from_hf_config(config, loaded.spec.name)
    except (OSError, ValueError, RecursionError) as unusable:
        yield _unusable(loaded, path, str(unusable))
    except (TypeError, AttributeError, LookupError, ArithmeticError):
        yield _unusable(loaded, path, "a key holds another type of value than Hugging Face configurations have there")


def _unusable(loaded: LoadedJob, path: str, why: str) -> Diagnostic:
    return error("MP143", f"the model's configuration cannot be used: {why}", loaded.at(path), field=path)


def _read_json(file: Path) -> Any:
    with file.open("rb") as stream:
        raw = stream.read(LARGEST_CONFIG_BYTES + 1)
    if len(raw) > LARGEST_CONFIG_BYTES:
        raise ValueError(f"{file} is larger than {LARGEST_CONFIG_BYTES:,} bytes")
    return json.loads(raw)


def _gpus(loaded: LoadedJob) -> Iterator[Diagnostic]:
    cluster = loaded.spec.cluster
    named = [("cluster.gpu", cluster.gpu)] if cluster.gpu is not None else []
    named += [(f"cluster.groups.{index}.gpu", group.gpu) for index, group in enumerate(cluster.groups)]
    for path, name in named:
        yield from _in_catalog(loaded, path, name, gpu_names(), find_gpu, "MP141", "GPU")


def _in_catalog(
    loaded: LoadedJob, path: str, name: str, known: tuple[str, ...], find: Callable[[str], object], code: str, what: str
) -> Iterator[Diagnostic]:
    try:
        find(name)
    except ValueError as unknown:
        _, _, hint = str(unknown).partition("; ")
        close = nearest(name, known)
        help = f"did you mean `{close}`?" if close else hint or f"`miles-plan {what.lower()}s` lists them"
        yield error(code, f"no {what} called `{name}` in the catalog", loaded.at(path), field=path, help=help)


def _reward(loaded: LoadedJob) -> Iterator[Diagnostic]:
    reward, where = loaded.spec.data.reward, loaded.at("data.reward")
    if reward is None:
        return
    if ":" not in reward:
        if reward not in BUILT_IN_REWARDS:
            close = nearest(reward, BUILT_IN_REWARDS)
            help = f"did you mean `{close}`?" if close else f"built in are {', '.join(BUILT_IN_REWARDS)}"
            yield error("MP144", f"no built-in reward `{reward}`", where, field="data.reward", help=help)
        return
    module, _, function = reward.partition(":")
    match look_up(reward, (Path(), loaded.directory)):
        case "no module":
            help = "fine if it is installed where the job runs"
            yield warning("MP144", f"no module `{module}` on this machine", where, field="data.reward", help=help)
        case "no function":
            yield error("MP144", f"module `{module}` has no `{function}`", where, field="data.reward")
