"""Timing and checking what memory bounds: log_prob and rms_norm, against the copy bandwidth of the same run."""

from __future__ import annotations

import torch

from miles_plan.kernels.cuda.log_prob import log_prob
from miles_plan.kernels.cuda.rms_norm import rms_norm

from .record import OURS, Record, relative_error
from .shapes import Shape
from .timing import Call, copies, time_side_by_side

DEVICE = "cuda"
COPIED_BYTES = 2**30


def copy_gb_per_s() -> float:
    """Bytes read and written a second while a gibibyte is copied; the faster of a copy and an elementwise kernel.

    The copy runs outside a graph: inside one it becomes a slower copy node.
    """
    source = torch.empty(COPIED_BYTES // 2, device=DEVICE, dtype=torch.int16).random_()
    target = torch.empty_like(source)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times_ms = []
    for run in (lambda: target.copy_(source), lambda: torch.add(source, 1, out=target)):
        run()
        start.record()
        for _ in range(10):
            run()
        stop.record()
        stop.synchronize()
        times_ms.append(start.elapsed_time(stop) / 10)
    return 2 * COPIED_BYTES / min(times_ms) / 1e6


def measure_log_prob(shape: Shape) -> Record:
    """log_prob; the logits are read once, and that is all it should cost. Baseline: torch's log_softmax and gather."""
    rows, vocab = shape["rows"], shape["vocab"]
    dtype = getattr(torch, shape["dtype"])
    moved = rows * vocab * dtype.itemsize
    logits = [(torch.randn(rows, vocab, device=DEVICE) * 4).to(dtype) for _ in range(copies(moved, 8))]
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    contenders: dict[str, list[Call]] = {OURS: [lambda x=x: log_prob(x, targets) for x in logits]}  # type: ignore[misc]  # a default binds the loop's value
    record = Record(shape, time_side_by_side(contenders), moved_bytes=moved)
    whole, middle = log_prob(logits[0], targets), slice(rows // 2, rows // 2 + 1)
    record.same_bits = torch.equal(whole[middle], log_prob(logits[0][middle], targets[middle]))
    some = slice(0, min(rows, 64))
    exact = torch.log_softmax(logits[0][some].double(), -1).gather(1, targets[some, None])[:, 0]
    record.error = relative_error(whole[some], exact)
    theirs = torch.log_softmax(logits[0][some].float(), -1).gather(1, targets[some, None])[:, 0]
    record.baseline_error = relative_error(theirs, exact)
    return record


def measure_rms_norm(shape: Shape) -> Record:
    """rms_norm, optionally with the residual; beside it a copy of the same size."""
    rows, width, residual = shape["rows"], shape["width"], shape["residual"]
    dtype = getattr(torch, shape["dtype"])
    tensors = 4 if residual else 2
    moved = tensors * rows * width * dtype.itemsize
    count = copies(moved, 16)
    xs, others, outs = ([torch.randn(rows, width, device=DEVICE).to(dtype) for _ in range(count)] for _ in range(3))
    weight = torch.randn(width, device=DEVICE).to(dtype)
    others_or_none = others if residual else [None] * count
    contenders: dict[str, list[Call]] = {
        OURS: [lambda x=x, r=r: rms_norm(x, weight, 1e-6, r) for x, r in zip(xs, others_or_none, strict=True)],  # type: ignore[misc]  # defaults bind the loop's values
        "torch": [lambda x=x: torch.nn.functional.rms_norm(x, (width,), weight, 1e-6) for x in xs],  # type: ignore[misc]  # likewise
        "elementwise copy": [lambda x=x, y=y: torch.add(x, 1, out=y) for x, y in zip(xs, outs, strict=True)],  # type: ignore[misc]  # likewise
    }
    if residual:  # torch has no fused form; the copy moves half the bytes
        contenders = {OURS: contenders[OURS]}
    record = Record(shape, time_side_by_side(contenders), moved_bytes=moved)
    first = rms_norm(xs[0], weight, 1e-6, others_or_none[0])
    middle = slice(rows // 2, rows // 2 + 1)
    alone = rms_norm(xs[0][middle], weight, 1e-6, others[0][middle] if residual else None)
    whole, one = (first[0], alone[0]) if isinstance(first, tuple) and isinstance(alone, tuple) else (first, alone)
    assert isinstance(whole, torch.Tensor)
    assert isinstance(one, torch.Tensor)
    record.same_bits = torch.equal(whole[middle], one)
    if not residual:
        exact = torch.nn.functional.rms_norm(xs[0].double(), (width,), weight.double(), 1e-6)
        record.error = relative_error(whole, exact)
        record.baseline_error = relative_error(torch.nn.functional.rms_norm(xs[0], (width,), weight, 1e-6), exact)
    return record
