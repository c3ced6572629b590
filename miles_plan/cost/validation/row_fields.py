"""Reads the loose fields of a published row: which model, which GPU, how many layers of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from miles_plan.catalog.architecture import ModelArchitecture
from miles_plan.catalog.gpus import Gpu, find_gpu
from miles_plan.catalog.models import find_model

Row = Mapping[str, Any]


class UnmappedRowError(ValueError):
    """The row cannot become a fixed-layout job; the message is the reason."""


class IncompleteRowError(UnmappedRowError):
    """The row itself leaves out what a job needs, contradicts itself, or measures something that is not estimated."""


_GPU_PATTERNS = (  # first match wins, so longer names come first
    ("grand teton", "h100-500w"),
    ("gb300", "gb300"),
    ("gb200", "gb200"),
    ("gh200", "gh200"),
    ("gb10", "gb10"),
    ("dgx spark", "gb10"),
    ("b300", "b300"),
    ("b200", "b200"),
    ("h200", "h200"),
    ("h800", "h800"),
    ("h100", "h100"),
    ("h20", "h20"),
    ("a100", "a100"),
    ("mi355", "mi355x"),
    ("mi350", "mi350x"),
    ("mi325", "mi325x"),
    ("mi300", "mi300x"),
    ("h-class", "h100"),
    ("80gb-class", "h100"),
)


_GPU_NAMES = re.compile(r"\b(?:g?b[23]00|gh200|h[128]00|h20|a100|mi3\d\dx?)\b")
_VAGUE = re.compile(r"unstated|see |node|class")


def row_gpu(row: Row) -> Gpu:
    """The GPU a row was measured on.

    Raises:
        UnmappedRowError: the row does not say, or names one the catalog lacks.
    """
    said = row.get("hardware")
    if not said:
        raise IncompleteRowError("hardware is not stated")
    text = str(said).lower()
    if len(set(_GPU_NAMES.findall(text))) > 1:
        raise IncompleteRowError("hardware is not stated")  # one of several
    for pattern, name in _GPU_PATTERNS:
        if pattern in text:
            return _of_stated_memory(find_gpu(name), text)
    if _VAGUE.search(text):
        raise IncompleteRowError("hardware is not stated")
    raise UnmappedRowError("hardware is not in the catalog")


_MEMORY = re.compile(r"(?<![\w.])(\d{2,3}) ?gb\b")


def _of_stated_memory(gpu: Gpu, text: str) -> Gpu:
    """The variant of a GPU that a row names, such as an A100 of 40 GB."""
    stated = _MEMORY.search(text)
    share = int(stated[1]) * 1e9 / gpu.memory_bytes if stated else 1.0
    if 0.85 < share < 1.15 or not 0.2 < share < 2.0:
        return gpu
    return replace(gpu, memory_bytes=int(gpu.memory_bytes * share), usable_bytes=int(gpu.usable_bytes * share))


_NOISE = re.compile(r"\b(lora|qlora|sft|peft|class|base|hf|nvfp4|fp8|bf16|int4|unstated.*|see .*)\b", re.IGNORECASE)
_VAGUE_MODEL = re.compile(r"^$|unstated|see issue|large MoE|^\d+B MoE$|^(?:qwen3|glm ?4\.[57])(?: moe)?$", re.IGNORECASE)
"""Names of nothing in particular, and of whole families."""
_CUT = re.compile(
    r"(?:truncated|reduced|cut)\s+to\s+(\d+)\s+layers?|[-_ (](\d+)[-_ ]?layers?\)?|[-_ ][lL](\d+)(?:$|[-_ ])",
    re.IGNORECASE,
)


def row_model(row: Row) -> ModelArchitecture:
    """The model a row names, cut to fewer layers where it says so.

    Raises:
        UnmappedRowError: the catalog has no such model.
    """
    said = str(row.get("model") or "")
    cut = _CUT.search(said)
    layers = size_of(row, "num_layers", 0) or (next(int(each) for each in cut.groups() if each) if cut else 0)
    for candidate in _candidates(_CUT.sub(" ", said)):
        try:
            model = find_model(candidate)
        except ValueError:
            continue
        if not layers or layers >= model.num_layers:
            return model
        return model.cut(layers, f"{model.name}-first-{layers}")
    if _VAGUE_MODEL.search(said):
        raise IncompleteRowError("the model is not stated")
    raise UnmappedRowError("model is not in the catalog")


def _candidates(said: str) -> list[str]:
    """Spellings to try, the most literal first."""
    text = re.sub(r"\(.*?\)", " ", said)
    plain = re.sub(r"\s+", " ", _NOISE.sub(" ", text)).strip(" -_")
    joined = [re.sub(r"[\s_]+", "-", each.strip()) for each in (text, plain)]
    words = plain.split(" ")
    out = [said, *joined, "-".join(words[:2]), words[0] if words else ""]
    out += [each.split("/")[0] for each in joined]
    return [each.strip("-") for each in dict.fromkeys(out) if each.strip("-")]


LARGEST_SIZE = 100_000_000
"""Of the tokens of a step; everything else is far smaller."""

_PRECISIONS = (
    ("nvfp4", "nvfp4"),
    ("fp4", "nvfp4"),
    ("mxfp8", "mxfp8"),
    ("fp8_mx", "mxfp8"),
    ("fp8", "fp8"),
    ("float8", "fp8"),
)


def row_precision(row: Row, default: str = "bf16") -> str:
    """The precision of the matrix products: bf16, fp16, fp32, fp8, mxfp8 or nvfp4."""
    text = str(row.get("precision") or default).lower()
    if "rowwise" in text:
        return "bf16"  # its kernels of 2025 ran no faster (torchtitan's own table)
    for pattern, name in _PRECISIONS:
        if pattern in text:
            return name
    return {"fp16": "fp16", "fp32": "fp32"}.get(text, "bf16")


_RELEASE = re.compile(r"container (\d\d\.\d\d)(?:\.(\d\d))?")


def row_release(row: Row) -> str:
    """The software release a row's notes name, such as `26.06`; empty where they do not."""
    match = _RELEASE.search(str(row.get("notes") or ""))
    return match.group(1) if match else ""


def size_of(row: Row, name: str, default: int = 1) -> int:
    """A size, written as a number or in digits; missing, null and 0 count as the default, and so do words (`n/a`).

    Raises:
        IncompleteRowError: negative, not whole, or larger than anything built.
    """
    value = _number(row.get(name))
    if value is None or not value:
        return default
    if not 0 < value <= LARGEST_SIZE or value != int(value):
        raise IncompleteRowError(f"{name} is {value:g}")
    return int(value)


def figure_of(row: Row, name: str, default: float | None = None) -> float:
    """A figure, written as a number or in digits.

    Raises:
        IncompleteRowError: not stated and without a default, not a number, or not finite.
    """
    said = row.get(name)
    if said is None or said == "":
        if default is None:
            raise IncompleteRowError(f"{name} is not stated")
        return default
    value = _number(said)
    if value is None:
        raise IncompleteRowError(f"{name} is not a number")
    return value


_SECONDS = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "minutes": 60.0, "h": 3600.0}


def seconds_of(row: Row, unit: str) -> float:
    """The row's value as seconds; `unit` is meant where it states none.

    Raises:
        IncompleteRowError: no value, or not in a unit of time.
    """
    factor = _SECONDS.get(str(row.get("unit") or unit).strip().lower())
    if factor is None:
        raise IncompleteRowError("the unit is not a time")
    return figure_of(row, "value") * factor


def words_of(row: Row, name: str) -> str:
    """A text that a row must have.

    Raises:
        IncompleteRowError: not stated.
    """
    if not isinstance(said := row.get(name), str) or not said:
        raise IncompleteRowError(f"{name} is not stated")
    return said


def _number(said: Any) -> float | None:
    """A finite number, also in digits; None for anything else."""
    if isinstance(said, bool) or not isinstance(said, int | float | str):
        return None
    try:
        value = float(said)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None
