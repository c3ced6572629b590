"""What is measured: a list of shapes, the default one or a user's JSON file.

A file is a list of objects, each with "op" and that op's fields. A field may be a list of values, which stands for one shape
a value (a product over several lists), so `{"op": "matmul", "M": [1, 16, 256], "N": 6144, "K": 4096}` is three shapes.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIRED = None
HALF = "bfloat16"

# The fields of each op and what an absent one means.
FIELDS: dict[str, dict[str, Any]] = {
    "matmul": {"M": REQUIRED, "N": REQUIRED, "K": REQUIRED, "order": "chain", "dtype": HALF},
    "matmul_gradients": {"M": REQUIRED, "N": REQUIRED, "K": REQUIRED, "grad_order": "chain", "dtype": HALF},
    "grouped_matmul": {"tokens": REQUIRED, "N": REQUIRED, "K": REQUIRED, "experts": 128, "top_k": 8, "dtype": HALF},
    "fp8_matmul": {"M": REQUIRED, "N": REQUIRED, "K": REQUIRED},
    "fp8_grouped_matmul": {"tokens": REQUIRED, "N": REQUIRED, "K": REQUIRED, "experts": 128, "top_k": 8},
    "attention": {
        "batch": 1, "q_len": REQUIRED, "kv_len": REQUIRED, "heads": 32, "kv_heads": 8, "head_size": 128, "page": 0, "window": 0,
        "dtype": HALF,
    },
    "log_prob": {"rows": REQUIRED, "vocab": 151_936, "dtype": HALF},
    "rms_norm": {"rows": REQUIRED, "width": REQUIRED, "residual": False, "dtype": HALF},
    "decoder_layer": {"batch": 1, "q_len": REQUIRED, "kv_len": REQUIRED},
}  # fmt: skip
CHOICES = {
    "order": ("chain", "tree"),
    "grad_order": ("chain", "tree"),
    "dtype": ("bfloat16", "float16", "float32"),
}


@dataclass(frozen=True)
class Shape:
    """One thing to time."""

    op: str
    fields: tuple[tuple[str, Any], ...]
    name: str = ""

    def __getitem__(self, field: str) -> Any:
        return dict(self.fields)[field]

    def to_dict(self) -> dict[str, Any]:
        """As it would stand in a file."""
        return {"op": self.op, **({"name": self.name} if self.name else {}), **dict(self.fields)}

    def __str__(self) -> str:
        values = " ".join(f"{key}={value}" for key, value in self.fields if value != FIELDS[self.op][key])
        return f"{self.name or self.op} {values}"


def expand(entry: dict[str, Any]) -> list[Shape]:
    """The shapes of one object of a file. Raises ValueError naming the field that is wrong."""
    entry = dict(entry)
    op, name = entry.pop("op", None), str(entry.pop("name", ""))
    if op not in FIELDS:
        raise ValueError(f"op is {op!r}; allowed: {', '.join(FIELDS)}")
    unknown = set(entry) - set(FIELDS[op])
    if unknown:
        raise ValueError(f"{op} has no field {sorted(unknown)[0]!r}; allowed: {', '.join(FIELDS[op])}")
    columns = []
    for field, default in FIELDS[op].items():
        value = entry.get(field, default)
        columns.append([_checked(op, field, one) for one in (value if isinstance(value, list) else [value])])
    return [Shape(op, tuple(zip(FIELDS[op], row, strict=True)), name) for row in itertools.product(*columns)]


def _checked(op: str, field: str, value: Any) -> Any:
    if field in CHOICES:
        if value not in CHOICES[field]:
            raise ValueError(f"{field} of {op} is {value!r}; allowed: {', '.join(CHOICES[field])}")
    elif field == "residual":
        if not isinstance(value, bool):
            raise ValueError(f"{field} of {op} is {value!r}; allowed: true or false")
    elif not isinstance(value, int) or isinstance(value, bool) or value < (0 if field in ("page", "window") else 1):
        raise ValueError(f"{field} of {op} is {value!r}; allowed: a positive integer")
    return value


def read_shapes(path: Path) -> list[Shape]:
    """The shapes of a JSON file. Raises ValueError naming what is wrong with it."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} holds no list of objects; allowed: a list of shapes such as {SHAPE_EXAMPLE}")
    return [shape for entry in entries for shape in expand(entry)]


SHAPE_EXAMPLE = '{"op": "matmul", "M": [1, 16], "N": 6144, "K": 4096}'

# (name, N, K, order): o_proj and down_proj are split along K by tensor parallelism and so are trees.
PROJECTIONS = (
    ("Qwen3-8B qkv", 6144, 4096, "chain"),
    ("Qwen3-8B o", 4096, 4096, "tree"),
    ("Qwen3-8B gate_up", 24_576, 4096, "chain"),
    ("Qwen3-8B down", 4096, 12_288, "tree"),
    ("Qwen3-8B head", 151_936, 4096, "chain"),
    ("Qwen3-30B-A3B qkv", 5120, 2048, "chain"),
    ("Qwen3-30B-A3B o", 2048, 4096, "tree"),
    ("Qwen3-30B-A3B head", 151_936, 2048, "chain"),
    ("Llama-70B qkv", 10_240, 8192, "chain"),
    ("Llama-70B o", 8192, 8192, "tree"),
    ("Llama-70B gate_up", 57_344, 8192, "chain"),
    ("Llama-70B down", 8192, 28_672, "tree"),
    ("Llama-70B head", 128_256, 8192, "chain"),
    ("DeepSeek-V3 qkv_a", 2112, 7168, "chain"),
    ("DeepSeek-V3 q_b", 24_576, 1536, "chain"),
    ("DeepSeek-V3 kv_b", 32_768, 512, "chain"),
    ("DeepSeek-V3 o", 7168, 16_384, "tree"),
    ("DeepSeek-V3 dense gate_up", 36_864, 7168, "chain"),
    ("DeepSeek-V3 dense down", 7168, 18_432, "tree"),
    ("DeepSeek-V3 shared gate_up", 4096, 7168, "chain"),
    ("DeepSeek-V3 shared down", 7168, 2048, "tree"),
    ("DeepSeek-V3 head", 129_280, 7168, "chain"),
)
# Tuned too, not benchmarked: other models that are often trained, and the small ones that whole runs are tested with.
OTHER_PROJECTIONS = (
    ("Llama-8B gate_up", 28_672, 4096, "chain"),
    ("Llama-8B down", 4096, 14_336, "tree"),
    ("Llama-8B head", 128_256, 4096, "chain"),
    ("Qwen2.5-7B qkv", 4608, 3584, "chain"),
    ("Qwen2.5-7B o", 3584, 3584, "tree"),
    ("Qwen2.5-7B gate_up", 37_888, 3584, "chain"),
    ("Qwen2.5-7B down", 3584, 18_944, "tree"),
    ("Qwen2.5-7B head", 152_064, 3584, "chain"),
    ("Qwen3-4B qkv", 6144, 2560, "chain"),
    ("Qwen3-4B o", 2560, 4096, "tree"),
    ("Qwen3-4B gate_up", 19_456, 2560, "chain"),
    ("Qwen3-4B down", 2560, 9728, "tree"),
    ("Qwen3-4B head", 151_936, 2560, "chain"),
    ("Qwen3-14B qkv", 7168, 5120, "chain"),
    ("Qwen3-14B o", 5120, 5120, "tree"),
    ("Qwen3-14B gate_up", 34_816, 5120, "chain"),
    ("Qwen3-14B down", 5120, 17_408, "tree"),
    ("Qwen3-14B head", 151_936, 5120, "chain"),
    ("Qwen3-32B qkv", 10_240, 5120, "chain"),
    ("Qwen3-32B o", 5120, 8192, "tree"),
    ("Qwen3-32B gate_up", 51_200, 5120, "chain"),
    ("Qwen3-32B down", 5120, 25_600, "tree"),
    ("Qwen3-0.6B qkv", 4096, 1024, "chain"),
    ("Qwen3-0.6B o", 1024, 2048, "tree"),
    ("Qwen3-0.6B gate_up", 6144, 1024, "chain"),
    ("Qwen3-0.6B down", 1024, 3072, "tree"),
    ("Qwen3-0.6B head", 151_936, 1024, "chain"),
    ("Qwen3-1.7B qkv", 4096, 2048, "chain"),
    ("Qwen3-1.7B o", 2048, 2048, "tree"),
    ("Qwen3-1.7B gate_up", 12_288, 2048, "chain"),
    ("Qwen3-1.7B down", 2048, 6144, "tree"),
)
SHARDED = {
    "Qwen3-8B": (2, 4, 8),
    "Qwen3-30B-A3B": (2, 4),
    "Llama-70B": (4, 8),
    "Qwen2.5-7B": (2, 4),
    "Qwen3-32B": (2, 4, 8),
}  # over ranks
MICRO_BATCH = 16_384  # tokens
MEASURED_IN_TRAINING = ("Qwen3-1.7B", "Qwen3-30B-A3B head")  # one model's gradients; the two share their head
TRAINED = ("Qwen3-1.7B", "Qwen3-8B", "Qwen3-30B-A3B")  # whose gradients are tuned
EXPERTS = (("Qwen3-30B-A3B experts gate_up", 1536, 2048), ("Qwen3-30B-A3B experts down", 2048, 768))
ROWS = [1, 16, 32, 64, 128, 256, 512, 1024, 4096, 16_384]
TOKENS = [16, 64, 256, 1024, 4096, 16_384]


def other_shapes() -> list[Shape]:
    """The products of models that are tuned and not benchmarked, and one rank's of layers whose columns ranks split."""
    shards = [
        (f"{name}, a shard of tp {ranks}", n // ranks, k, order)
        for name, n, k, order in (*PROJECTIONS, *OTHER_PROJECTIONS)
        for ranks in SHARDED.get(name.partition(" ")[0], ())
        if order == "chain" and not name.endswith("head")
    ]
    entries = [
        {"op": "matmul", "name": name, "M": ROWS, "N": n, "K": k, "order": order}
        for name, n, k, order in (*OTHER_PROJECTIONS, *shards)
    ]
    return [shape for entry in entries for shape in expand(entry)]


def gradient_shapes() -> list[Shape]:
    """What training takes the gradients of: a layer whose columns ranks split sums its input's gradient as the tree, and the other way
    round (`parallel_linear`). Models of one width share their head."""
    layers = [layer for layer in (*PROJECTIONS, *OTHER_PROJECTIONS) if layer[0].startswith(TRAINED)]
    entries = [
        {
            "op": "matmul_gradients",
            "name": name,
            "M": MICRO_BATCH,
            "N": n,
            "K": k,
            "grad_order": "tree" if order == "chain" else "chain",
        }
        for name, n, k, order in layers
    ]
    return [shape for entry in entries for shape in expand(entry)]


def default_shapes() -> list[Shape]:
    """The issue of what must be fast: projections and heads of four models, experts, attention, the rest, a whole layer."""
    entries: list[dict[str, Any]] = [
        {"op": "matmul", "name": name, "M": ROWS, "N": n, "K": k, "order": order} for name, n, k, order in PROJECTIONS
    ]
    entries += [{"op": "grouped_matmul", "name": name, "tokens": TOKENS, "N": n, "K": k} for name, n, k in EXPERTS]
    entries += [{"op": "attention", "name": "prefill", "q_len": n, "kv_len": n} for n in (4096, 16_384, 32_768)]
    entries += [
        {"op": "attention", "name": "decode", "batch": [1, 4, 16, 64], "q_len": 1, "kv_len": [4096, 16_384, 32_768]},
        {"op": "attention", "name": "decode paged", "batch": [1, 16, 64], "q_len": 1, "kv_len": 8192, "page": 64},
        {"op": "log_prob", "rows": [1, 64, 256, 1024, 4096, 16_384]},
        {"op": "rms_norm", "rows": [1, 256, 4096, 16_384], "width": [2048, 4096, 8192]},
        {"op": "rms_norm", "rows": 16_384, "width": 4096, "residual": True},
        {"op": "matmul", "name": "float32", "M": 1024, "N": 4096, "K": 4096, "dtype": "float32"},
        {"op": "fp8_matmul", "name": "Qwen3-8B qkv", "M": [1, 16, 64, 256, 1024, 8192], "N": 6144, "K": 4096},
        {"op": "fp8_matmul", "name": "Qwen3-8B down", "M": [1, 64, 1024, 8192], "N": 4096, "K": 12_288},
        {
            "op": "fp8_grouped_matmul",
            "name": "Qwen3-30B-A3B experts gate_up",
            "tokens": [16, 1024, 16_384],
            "N": 1536,
            "K": 2048,
        },
        {"op": "decoder_layer", "name": "Qwen3-8B decode", "batch": [1, 16, 64, 256], "q_len": 1, "kv_len": 4096},
        {"op": "decoder_layer", "name": "Qwen3-8B prefill", "q_len": 16_384, "kv_len": 16_384},
    ]
    measured = [shape for entry in entries for shape in expand(entry)]
    return measured + [shape for shape in gradient_shapes() if shape.name.startswith(MEASURED_IN_TRAINING)]
