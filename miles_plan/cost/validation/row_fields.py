"""Reads the loose fields of a published row: which model, which GPU, how many layers of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    for pattern, name in _GPU_PATTERNS:
        if pattern in text:
            return find_gpu(name)
    if _VAGUE.search(text):
        raise IncompleteRowError("hardware is not stated")
    raise UnmappedRowError("hardware is not in the catalog")


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
    layers = row.get("num_layers") or (next(int(each) for each in cut.groups() if each) if cut else None)
    for candidate in _candidates(_CUT.sub(" ", said)):
        try:
            model = find_model(candidate)
        except ValueError:
            continue
        if not layers or int(layers) >= model.num_layers:
            return model
        return model.cut(int(layers), f"{model.name}-first-{layers}")
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
    """A size; missing, null and 0 count as the default.

    Raises:
        IncompleteRowError: negative, or larger than anything built.
    """
    value = row.get(name)
    if not isinstance(value, int | float) or not value:
        return default
    if not 0 < value <= LARGEST_SIZE:
        raise IncompleteRowError(f"{name} is {value:g}")
    return int(value)
