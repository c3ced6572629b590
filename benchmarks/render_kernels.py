"""Put the kernels' committed results into docs/kernels.md: python -m benchmarks.render_kernels

Reads kernels_h200.json (`python -m benchmarks.kernels --out`), kernels_untuned_h200.json (the same of a list that no table
knows) and kernels_verify_h200.json (`miles-plan kernels verify --json`) of benchmarks/results; a file that is missing says so
in the page. Only the text between the two markers changes.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
SPEED = "benchmarks/results/kernels_h200.json"
UNTUNED = "benchmarks/kernels/untuned_shapes.json"
BEGIN, END = "<!-- results: python -m benchmarks.render_kernels -->", "<!-- end of results -->"


def load(path: Path) -> dict[str, Any] | None:
    """The file's object, or None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def speed(results: dict[str, Any] | None) -> str:
    """What was promised and what was measured, then each op's ratios by size."""
    if results is None:
        return f"No speed figures are committed. `python -m benchmarks.kernels --out {SPEED}` measures them."
    lines = [
        *_about(results["machine"]),
        "",
        "| figure | measured | reached |",
        "|---|---|---|",
    ]
    lines += [f"| {row['what']} | {row['figure']} | {'yes' if row['met'] else '**no**'} |" for row in results["summary"]]
    return "\n".join([*lines, "", *_by_op(results["records"])])


def untuned(results: dict[str, Any] | None) -> str:
    """Each op's ratios over shapes that no table knows."""
    if results is None:
        return (
            "None are committed. `python -m benchmarks.kernels --shapes benchmarks/kernels/untuned_shapes.json` measures them."
        )
    return "\n".join([*_about(results["machine"]), "", *_by_op(results["records"])])


def _about(machine: dict[str, Any]) -> list[str]:
    """What was measured, on what and how."""
    return [
        f"{machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}, {machine['date']}; {machine['measured']} of "
        f"{machine['shapes']} shapes in {machine['seconds']} s. Device time, baselines in the same process, inputs rotated "
        "past L2, random data.",
        *(["", machine["note"]] if "note" in machine else []),
    ]


def _by_op(records: list[dict[str, Any]]) -> list[str]:
    """A row an op: the geometric mean and the range of baseline time over ours."""
    lines = [
        "| op | shapes | times the baseline's speed, geometric mean (lowest to highest) | shapes whose bits differed |",
        "|---|---|---|---|",
    ]
    for op in sorted({record["shape"]["op"] for record in records}):
        mine = [record for record in records if record["shape"]["op"] == op]
        ratios = [record["ratio"] for record in mine if "ratio" in record]
        wrong = sum(record.get("same_bits") is False or "failure" in record for record in mine)
        figure = "no baseline"
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            figure = f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {op} | {len(mine)} | {figure} | {wrong} |")
    return lines


def bits(results: dict[str, Any] | None) -> str:
    """Comparisons and differing bits by op and dtype."""
    if results is None:
        return "No verification is committed. `miles-plan kernels verify --json` makes one."
    ops = results["ops"]
    lines = [
        f"{results['gpu']}, torch {results['torch_version']}, Triton {results['triton_version']}, {results['date']}, "
        f"{results['seconds']:.0f} s: {sum(op['draws'] for op in ops):,} comparisons, "
        f"{sum(op['differing_elements'] for op in ops):,} differing elements.",
        *(["", results["note"]] if "note" in results else []),
        "",
        "| op | comparisons (differing elements) by dtype |",
        "|---|---|",
    ]
    for name in dict.fromkeys(op["op"] for op in ops):
        cells = [f"{op['dtype']} {_outcome(op)}" for op in ops if op["op"] == name]
        lines.append(f"| {name} | {', '.join(cells)} |")
    return "\n".join(lines)


def _outcome(op: dict[str, Any]) -> str:
    """Comparisons and differing elements, and how it failed if it did."""
    compared = f"{op['draws']:,} ({op['differing_elements']:,})"
    return compared if not op["error"] else f"{compared}, then failed"


def rendered(page: str, results: Path = RESULTS) -> str:
    """The page with the results of this folder between its markers. Raises ValueError if they are missing."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must hold {BEGIN!r} and {END!r} once each")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    parts = [f"### Bits\n\n{bits(load(results / 'kernels_verify_h200.json'))}"]
    parts.append(f"### Speed\n\n{speed(load(results / 'kernels_h200.json'))}")
    parts.append(f"### Speed of shapes that no table knows\n\n{untuned(load(results / 'kernels_untuned_h200.json'))}")
    return f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}"


def main() -> int:
    """Rewrite docs/kernels.md."""
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
