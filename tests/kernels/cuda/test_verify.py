"""What `verify` counts and says, with checks of our own; the real checks run on a GPU."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch

from miles_plan.kernels.cuda import verify as verify_module
from miles_plan.kernels.cuda.attention import HEAD_SIZES, VALUE_SIZES
from miles_plan.kernels.cuda.draw import Draw, differing
from miles_plan.kernels.cuda.invariance_checks import CHECKS, Check
from miles_plan.kernels.cuda.invariance_of_attention import FAST_HEADS, OTHER_HEADS
from miles_plan.kernels.cuda.verify import OpReport, Report, run_pairs, shares_of, verify

CPU = torch.device("cpu")


def agrees(draw: Draw, dtype: torch.dtype) -> None:
    x = draw.normal(8, 16, dtype=dtype)
    for rows in draw.spans(8):
        draw.compare((x * 2)[rows], x[rows] * 2, f"rows {rows}")


def differs_from_the_third_seed(draw: Draw, dtype: torch.dtype) -> None:
    x = draw.normal(4, dtype=dtype)
    draw.compare(x, x, "the same")
    draw.compare(x, x + (draw.integer(1, 100) > 40), f"shifted by {draw.integer(1, 9)}")


def fails(draw: Draw, dtype: torch.dtype) -> None:
    raise RuntimeError("no such kernel")


def test_bits_are_counted() -> None:
    x = torch.tensor([0.0, float("nan"), 1.0])
    assert differing(x, x.clone()) == 0
    assert differing(x, torch.tensor([-0.0, float("nan"), 1.0])) == 1, "a zero's sign is a bit"
    assert differing(x, x[:2]) == 3
    assert differing(x, x.double()) == 3


def test_a_seed_gives_the_same_draw() -> None:
    first, second = Draw(3, CPU), Draw(3, CPU)
    assert first.spans(100) == second.spans(100)
    assert torch.equal(first.normal(5), second.normal(5))
    sizes = [Draw(seed, CPU).integer(1, 1000) for seed in range(300)]
    assert min(sizes) == 1
    assert max(sizes) > 700
    assert sum(size <= 31 for size in sizes) > 100, "small numbers are as likely as large ones"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_third_seed_draws_heavy_values(dtype: torch.dtype) -> None:
    plain, heavy = Draw(4, CPU), Draw(5, CPU)
    assert torch.equal(plain.values(50, dtype=dtype), Draw(4, CPU).normal(50, dtype=dtype))
    x = heavy.values(400, 1000, dtype=dtype, scale=2.0)
    assert x.isfinite().all()
    columns = x.double().square().mean(0).sqrt()
    assert columns.max() > 20
    assert columns.square().mean().sqrt().item() == pytest.approx(2.0, rel=0.3)
    assert 5 < (columns < 1e-4).sum() < 100, "columns of zeros"
    subnormal = (x != 0) & (x.abs() < torch.finfo(dtype).tiny)
    assert subnormal.sum() > 300


def test_the_first_difference_is_named_with_its_seed_and_shape() -> None:
    pairs = [
        (Check("fine", agrees), torch.float16),
        (Check("odd", differs_from_the_third_seed), torch.float32),
        (Check("no", fails), torch.float32),
    ]
    fine, odd, broken = run_pairs(pairs, 0, "cpu", time.time() + 0.3)
    assert fine.ok
    assert fine.draws % 6 == 0
    assert fine.draws > 6
    assert not odd.ok
    assert odd.first_shape is not None
    assert odd.first_shape.startswith("shifted by")
    draw = Draw(odd.first_seed or 0, CPU)
    differs_from_the_third_seed(draw, torch.float32)
    assert draw.outcome() == (4, odd.first_shape), "the seed shows it again"
    assert broken.error == "RuntimeError: no such kernel (seed 0)"
    report = Report("a gpu", "2", "3", "2026-01-01", 1.0, [fine, odd, broken])
    assert report.first is odd
    assert not report.to_dict()["ok"]
    assert not OpReport("never drawn", "float32").ok


def test_every_check_runs_at_least_once_and_is_described() -> None:
    reports = run_pairs([(Check("fine", agrees), torch.float16)], 0, "cpu", time.time() - 1)
    assert [report.draws for report in reports] == [6]
    assert all(check.run.__doc__ for check in CHECKS)
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_every_head_size_is_drawn() -> None:
    assert {heads.d for heads in (*FAST_HEADS, *OTHER_HEADS)} == set(HEAD_SIZES)
    assert {heads.dv for heads in (*FAST_HEADS, *OTHER_HEADS)} == set(VALUE_SIZES)


def test_heavy_checks_are_spread_and_none_is_lost() -> None:
    shares = shares_of([1, 8, 1, 8, 4, 1, 1], 3)
    assert sorted(index for share in shares for index in share) == list(range(7))
    assert [1] in shares
    assert [3] in shares
    assert shares_of([1, 1], 16) == [[0], [1]]


def test_a_process_that_never_ends_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that waits for ever must not make the report wait too."""
    monkeypatch.setattr(verify_module, "MOST_LATE_S", 0.5)
    slow = next(check for check in CHECKS if check.name == "linear_log_prob")  # minutes on a CPU
    before = set(multiprocessing.active_children())
    (report,) = verify_module._run_in_processes([(slow, torch.bfloat16)], 1, "cpu", time.time(), 2)
    assert not report.ok
    assert report.error is not None
    assert report.error.startswith("its process did not end within 0.5 s of its time; a kernel may wait")
    assert report.error.endswith("(with linear_log_prob (bfloat16))")
    for process in set(multiprocessing.active_children()) - before:
        process.join(timeout=10)
        assert not process.is_alive()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"^device is 'cuda'; allowed: a CUDA device that is there"):
        verify()
