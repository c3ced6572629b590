"""The figures that this project promises, computed from a run's records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .record import Record

Rule = Callable[[Record], bool]


def _matmul(order: str, low: int, high: int) -> Rule:
    return lambda r: (
        r.shape.op == "matmul" and r.shape["order"] == order and r.shape["dtype"] != "float32" and low <= r.shape["M"] <= high
    )


def _attention(decode: bool) -> Rule:
    return lambda r: r.shape.op == "attention" and (r.shape["q_len"] == 1) == decode and not r.shape["page"]


# (what, which records, least geometric mean, least single ratio or None)
RATIOS: tuple[tuple[str, Rule, float, float | None], ...] = (
    ("matmul chain, M <= 16, against the faster cuBLAS", _matmul("chain", 1, 16), 1.05, 0.90),
    ("matmul chain, M 32 to 512", _matmul("chain", 32, 512), 1.00, 0.90),
    ("matmul chain, M >= 1024", _matmul("chain", 1024, 1 << 30), 1.03, 0.90),
    ("matmul tree", _matmul("tree", 1, 1 << 30), 0.95, 0.85),
    ("grouped_matmul against the better of torch and DeepGEMM", lambda r: r.shape.op == "grouped_matmul", 1.05, None),
    ("attention prefill against the best of torch and FlashAttention-3", _attention(False), 0.90, 0.90),
    ("attention decode against the best of torch and FlashAttention-3", _attention(True), 1.00, 1.00),
    (
        "rms_norm, 4,096 rows and more, against a copy of the same size",
        lambda r: r.shape.op == "rms_norm" and r.shape["rows"] >= 4096,
        0.90,
        0.90,
    ),
    ("decoder layer of Qwen3-8B against cuBLAS and torch", lambda r: r.shape.op == "decoder_layer", 1.00, 1.00),
)
# (what, which records, least share of the copy bandwidth)
RATES: tuple[tuple[str, Rule, float], ...] = (
    ("log_prob, 1,024 rows and more", lambda r: r.shape.op == "log_prob" and r.shape["rows"] >= 1024, 0.85),
    ("rms_norm, 4,096 rows and more", lambda r: r.shape.op == "rms_norm" and r.shape["rows"] >= 4096, 0.90),
)  # fmt: skip


def ratio_row(what: str, records: Sequence[Record], least_mean: float, least: float | None) -> dict[str, Any]:
    """One promise about a ratio: geometric mean and lowest point against their targets."""
    ratios = [record.ratio for record in records if record.ratio is not None]
    mean, worst = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios)), min(ratios)
    met = mean >= least_mean and (least is None or worst >= least)
    target = f">= {least_mean:.2f}x" + ("" if least is None else f", no point under {least:.2f}x")
    figure = f"{mean:.3f}x geometric mean of {len(ratios)}, lowest {worst:.3f}x (target {target})"
    return {"what": what, "figure": figure, "mean": round(mean, 3), "lowest": round(worst, 3), "met": met}


def summarise(records: Sequence[Record], copy_gb_per_s: float) -> list[dict[str, Any]]:
    """One row a promise: what it is about, the figure, the target, whether it is met. Rows without a record are left out."""
    rows: list[dict[str, Any]] = []
    for what, rule, least_mean, least in RATIOS:
        kept = [record for record in records if rule(record) and record.ratio is not None]
        if kept:
            rows.append(ratio_row(what, kept, least_mean, least))
        tuned = [record for record in kept if record.tuned]
        if tuned and len(tuned) < len(kept):
            rows.append(ratio_row(f"{what}: of these, on tuned tiles", tuned, least_mean, least))
    for what, rule, least_share in RATES:
        rates = [record.gb_per_s for record in records if rule(record) and record.gb_per_s is not None]
        if rates:
            share = min(rates) / copy_gb_per_s
            figure = (
                f"{share:.3f} of a large copy's {copy_gb_per_s:.0f} GB/s, lowest of {len(rates)} (target >= {least_share:.2f})"
            )
            rows.append({"what": what, "figure": figure, "lowest": round(share, 3), "met": share >= least_share})
    checked = [record.same_bits for record in records if record.same_bits is not None]
    rows.append(
        {
            "what": "shapes whose bits did not depend on the batch",
            "figure": f"{sum(checked)} of {len(checked)}",
            "met": all(checked),
        }
    )
    return rows
