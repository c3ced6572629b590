"""The benchmark's shape lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernels.record import Record
from benchmarks.kernels.shapes import default_shapes, expand, read_shapes
from benchmarks.kernels.summary import summarise
from miles_plan.kernels.cuda.gemm import TREE_LEAVES
from miles_plan.kernels.cuda.tuning import GemmProblem, table_for


def test_lists_stand_for_products(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps([{"op": "matmul", "name": "mine", "M": [1, 16], "N": [64, 128], "K": 256}]))
    shapes = read_shapes(path)
    assert [(s["M"], s["N"], s["order"]) for s in shapes] == [
        (1, 64, "chain"),
        (1, 128, "chain"),
        (16, 64, "chain"),
        (16, 128, "chain"),
    ]
    assert [expand(shape.to_dict()) == [shape] for shape in shapes] == [True] * 4


def test_the_untuned_shapes_are_in_no_table() -> None:
    products = [shape for shape in read_shapes(Path(kernels.__file__).parent / "untuned_shapes.json") if shape.op == "matmul"]
    choices = table_for("NVIDIA H200").choices
    for shape in products:
        leaves = TREE_LEAVES if shape["order"] == "tree" else 0
        dtype = getattr(torch, shape["dtype"])
        problem = GemmProblem(shape["M"], shape["N"], shape["K"], dtype, dtype, leaves)
        assert problem.key not in choices, shape
    assert len(products) > 60


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"op": "matmal"}, "op is 'matmal'; allowed: matmul"),
        ({"op": "matmul", "M": 1, "N": 2}, "K of matmul is None; allowed: a positive integer"),
        ({"op": "matmul", "M": 0, "N": 2, "K": 4}, "M of matmul is 0; allowed: a positive integer"),
        ({"op": "matmul", "M": 1, "N": 2, "K": 4, "order": "heap"}, "order of matmul is 'heap'; allowed: chain, tree"),
        ({"op": "matmul", "M": 1, "N": 2, "K": 4, "tokens": 3}, "matmul has no field 'tokens'; allowed: M, N, K"),
    ],
)
def test_a_wrong_field_is_named(entry: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(entry)


def test_the_default_list_covers_every_promise() -> None:
    shapes = default_shapes()
    records = [Record(shape, us={"ours": 1.0, "other": 1.2}, moved_bytes=4_000_000, same_bits=True) for shape in shapes]
    summary = summarise(records, copy_gb_per_s=4000.0)
    assert len(summary) == 12
    assert all(row["met"] for row in summary)
    slower = [Record(shape, us={"ours": 2.0, "other": 1.2}, moved_bytes=1, same_bits=False) for shape in shapes]
    assert not any(row["met"] for row in summarise(slower, copy_gb_per_s=4000.0))
