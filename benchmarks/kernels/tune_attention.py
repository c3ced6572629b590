"""Measure the variants of the prefill kernel: python -m benchmarks.kernels.tune_attention --out TABLE.json

Causal prefills of one sequence with the heads of Qwen3-8B. A variant counts only if its bits are the default's, also of sequences of
uneven lengths and with a window; of those the fastest at each length goes into the table. Point MILES_PLAN_ATTENTION_TABLE at it to
use it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import astuple
from functools import partial
from pathlib import Path

import torch

from miles_plan.kernels.cuda.attention import attention_by
from miles_plan.kernels.cuda.attention_variant import VARIANTS, PrefillVariant, head_key, to_json

from .timing import Call, time_side_by_side

LENGTHS = (4096, 16_384, 32_768)
HEADS, KV_HEADS, D = 32, 8, 128
UNEVEN = (1000, 37, 2500, 129)  # lengths of sequences side by side
SCALES = (1.0, 20.0)  # of the queries: as drawn, and far from even


def _packed(lengths: tuple[int, ...], scale: float) -> tuple[tuple[torch.Tensor, ...], dict[str, object]]:
    """Random sequences side by side: q, k, v, and where they lie."""
    new = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(sum(lengths), heads, D, **new) for heads in (HEADS, KV_HEADS, KV_HEADS))  # type: ignore[call-overload]  # a dict of keywords is beyond the stub
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device="cuda", dtype=torch.int32)
    return (q * scale, k, v), {"q_starts": starts, "max_q_len": max(lengths), "max_kv_len": max(lengths)}


def equal_variants() -> list[PrefillVariant]:
    """The variants whose outputs and log-sum-exps have the default's bits."""
    equal = list(VARIANTS)
    for lengths, scale, window in [(UNEVEN, scale, window) for scale in SCALES for window in (None, 700)] + [
        ((4096,), 1.0, None)
    ]:
        tensors, places = _packed(lengths, scale)
        results = {each: attention_by(each, *tensors, window=window, **places) for each in equal}
        equal = [each for each in equal if all(map(torch.equal, results[each], results[VARIANTS[0]]))]
    return equal


def _compile_all() -> None:
    """Compile every variant, each in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.kernels.tune_attention", "--compile"]
    for process in [subprocess.Popen([*command, str(i)]) for i in range(len(VARIANTS))]:
        process.wait()


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.tune_attention", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("attention.json"))
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile is not None:
        tensors, places = _packed(UNEVEN, 1.0)
        attention_by(VARIANTS[options.compile], *tensors, **places)
        return 0
    begin = time.monotonic()
    _compile_all()
    equal = equal_variants()
    for variant in VARIANTS:
        print(f"{[int(on) for on in astuple(variant)]} {'equal' if variant in equal else 'OTHER BITS'}", flush=True)
    print(f"compared in {time.monotonic() - begin:.0f} s", flush=True)
    row = {}
    for length in LENGTHS:
        tensors, places = _packed((length,), 1.0)
        contenders: dict[str, list[Call]] = {
            str(i): [partial(attention_by, each, *tensors, **places)] for i, each in enumerate(equal)
        }
        times = time_side_by_side(contenders)
        row[length] = equal[int(min(times, key=times.__getitem__))]
        print(length, {str([int(on) for on in astuple(equal[int(i)])]): f"{us:.1f} us" for i, us in times.items()}, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(to_json(torch.cuda.get_device_name(), {head_key(D, D): row}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
