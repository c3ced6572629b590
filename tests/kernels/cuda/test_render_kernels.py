"""docs/kernels.md shows the results that are committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import render_kernels
from benchmarks.render_kernels import BEGIN, END, PAGE, rendered


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert rendered(page) == page, "run python -m benchmarks.render_kernels"


def test_every_module_that_the_page_names_is_there() -> None:
    folder = Path(render_kernels.__file__).parent.parent / "miles_plan" / "kernels" / "cuda"
    named = {cell.split("`")[1] for cell in PAGE.read_text(encoding="utf-8").splitlines() if cell.startswith("| `")}
    assert len(named) >= 15
    assert all((folder / f"{name}.py").is_file() for name in named), named


def test_results_are_shown_and_failures_stand_out(tmp_path: Path) -> None:
    op = {"op": "swiglu", "dtype": "float16", "draws": 2000, "differing_elements": 0, "error": None}
    report = {
        "gpu": "NVIDIA H200", "torch_version": "2.11.0", "triton_version": "3.6.0", "date": "2026-11-21", "seconds": 60.4,
        "ops": [op, {**op, "dtype": "float32", "error": "RuntimeError: no"}],
    }  # fmt: skip
    (tmp_path / "kernels_verify_h200.json").write_text(json.dumps(report))
    shape = {"op": "matmul", "M": 1}
    speeds = {
        "machine": {
            "gpu": "NVIDIA H200", "torch": "2.11.0", "cuda": "13.0", "date": "2026-11-21", "measured": 2, "shapes": 3,
            "seconds": 9,
        },
        "summary": [{"what": "matmul chain", "figure": "0.9x", "met": False}],
        "records": [
            {"shape": shape, "ratio": 0.5, "same_bits": True}, {"shape": shape, "ratio": 2.0, "same_bits": False},
        ],
    }  # fmt: skip
    (tmp_path / "kernels_h200.json").write_text(json.dumps(speeds))
    page = rendered(f"before\n{BEGIN}\nold\n{END}\nafter\n", tmp_path)
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "old" not in page
    assert "4,000 comparisons, 0 differing elements" in page
    assert "| swiglu | float16 2,000 (0), float32 2,000 (0), then failed |" in page
    assert "| matmul chain | 0.9x | **no** |" in page
    assert "| matmul | 2 | 1.00 (0.50 to 2.00) | 1 |" in page
    assert "None are committed" in page
    (tmp_path / "kernels_untuned_h200.json").write_text(json.dumps(speeds))
    assert rendered(f"{BEGIN}{END}", tmp_path).count("| matmul | 2 | 1.00 (0.50 to 2.00) | 1 |") == 2
    assert "No speed figures are committed" in rendered(f"{BEGIN}{END}", tmp_path / "none")


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        rendered("a page")
