from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from miles_plan.backends.torch_engine.mesh import open_mesh
from miles_plan.backends.torch_engine.optimizer import ShardedAdamW
from miles_plan.backends.torch_engine.parameter_buffers import BufferedParameter, ParameterBuffer
from miles_plan.backends.training.learning_rate import learning_rate
from miles_plan.ir.layout import TrainLayout
from miles_plan.ir.options import OptimizerOptions
from miles_plan.kernels.collectives import RankGroup, single_rank

OPTIONS = OptimizerOptions(learning_rate=0.01, weight_decay=0.1, clip_grad_norm=0.5)
SHAPES = {"matrix": (5, 3), "norm": (3,), "other": (2, 4)}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def build(
    initial: dict[str, torch.Tensor], group: RankGroup | None = None, *, uncounted: str = "", dtype: torch.dtype = torch.float32
) -> ParameterBuffer:
    layout = [
        BufferedParameter(name=name, shape=tuple(each.shape), counted=name != uncounted, decayed=each.ndim > 1)
        for name, each in initial.items()
    ]
    buffer = ParameterBuffer(layout, group or single_rank(), dtype=dtype)
    buffer.weights.copy_(buffer.flatten(initial))
    return buffer


def optimizer_of(*buffers: ParameterBuffer, group: RankGroup | None = None) -> ShardedAdamW:
    masters = [buffer.weights[buffer.chunk].to(torch.float32, copy=True) for buffer in buffers]
    return ShardedAdamW(buffers, masters, group or single_rank())


def loss_of(owned: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return sum((owned[name].float() * torch.randn(SHAPES[name], generator=draw)).square().sum() for name in SHAPES)


def test_same_steps_as_torch_adamw():
    buffer = build(tensors(0))
    optimizer = optimizer_of(buffer)
    ours, theirs = buffer.parameters, {name: each.requires_grad_() for name, each in tensors(0).items()}
    reference = torch.optim.AdamW(
        [
            {"params": [each for each in theirs.values() if each.ndim > 1], "weight_decay": 0.1},
            {"params": [theirs["norm"]], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(4):
        buffer.gradients.zero_()
        loss_of(ours, step).backward()
        metrics = optimizer.step(OPTIONS)
        reference.zero_grad()
        loss_of(theirs, step).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        reference.step()
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        for name, each in ours.items():
            torch.testing.assert_close(each, theirs[name], rtol=1e-5, atol=1e-6)


def test_gradients_of_micro_batches_add_up_in_fp32_for_bf16_weights():
    buffer = build(tensors(0), dtype=torch.bfloat16)
    buffer.gradients.zero_()
    for _ in range(300):
        (buffer.parameters["norm"].sum() * 2**-7).backward()
    assert buffer.parameters["norm"].grad is None
    assert (buffer.views(buffer.gradients)["norm"] == 300 * 2**-7).all()  # bf16 would have stopped growing at 256 x 2**-7


def test_masters_keep_what_bf16_weights_cannot_hold():
    buffer = build(tensors(0), dtype=torch.bfloat16)
    optimizer = optimizer_of(buffer)
    before = optimizer.tensors()["buffer0.masters"].clone()
    buffer.gradients.zero_()
    loss_of(buffer.parameters, 0).backward()
    optimizer.step(replace(OPTIONS, learning_rate=1e-6))
    masters = optimizer.tensors()["buffer0.masters"]
    assert (masters != before).any()
    assert torch.equal(masters.bfloat16(), buffer.weights)


def test_a_norm_that_is_not_finite_skips_the_step():
    buffer = build(tensors(0))
    optimizer = optimizer_of(buffer)
    before, moments = buffer.weights.clone(), optimizer.tensors()["buffer0.first_moment"].clone()
    for bad in (math.inf, math.nan):
        buffer.gradients.zero_()
        (buffer.parameters["norm"].sum() * bad).backward()
        metrics = optimizer.step(OPTIONS)
        assert metrics["skipped_steps"] == 1.0
        assert not math.isfinite(metrics["grad_norm"])
    assert torch.equal(buffer.weights, before)
    assert torch.equal(optimizer.tensors()["buffer0.first_moment"], moments)
    assert optimizer.steps_taken == 0


def test_learning_rate_schedules_by_hand():
    warm = replace(OPTIONS, warmup_steps=4)
    assert [learning_rate(warm, step) for step in range(6)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    linear = replace(warm, schedule="linear", total_steps=8, min_learning_rate=0.002)
    assert [learning_rate(linear, step) for step in (4, 6, 8, 99)] == pytest.approx([0.01, 0.006, 0.002, 0.002])
    cosine = replace(linear, schedule="cosine")
    assert [learning_rate(cosine, step) for step in (4, 5, 6, 8)] == pytest.approx(
        [0.01, 0.002 + 0.008 * 0.5 * (1 + math.cos(math.pi / 4)), 0.006, 0.002]
    )
    with pytest.raises(ValueError, match="total_steps > warmup_steps"):
        learning_rate(replace(linear, total_steps=4), 4)


def train(rank: int, rendezvous: str | None, world_size: int) -> dict[str, object]:
    """Two buffers: one sharded over all ranks; one of this rank alone, whose `norm` all ranks hold alike, and rank 0 counts."""
    mesh = open_mesh(TrainLayout(dp=world_size), rank, rendezvous=rendezvous, timeout_s=60)
    alike = {"expert": torch.full((2, 2), 1.0 + rank), "norm": torch.ones(3)}
    buffers = [build(tensors(0), mesh.dp), build(alike, uncounted="norm" if rank else "")]
    optimizer = optimizer_of(*buffers, group=mesh.world)
    shared, own = buffers[0].parameters, buffers[1].parameters
    norms = []
    for step in range(3):
        for buffer in buffers:
            buffer.gradients.zero_()
        for part in range(4):
            if part % world_size == rank:
                loss_of(shared, 10 * step + part).backward()
        (own["expert"].sum() + own["norm"].sum()).backward()
        norms.append(optimizer.step(replace(OPTIONS, clip_grad_norm=0.0))["grad_norm"])
    mesh.close()
    weights = {name: each.detach().clone() for name, each in (shared | own).items()}
    return {"weights": weights, "norms": norms, "bytes": sum(each.nbytes for each in optimizer.tensors().values())}


def test_sharded_over_two_ranks_equals_one_rank(ranks):
    single = train(0, None, 1)
    first, second = ranks.run(train, 2, 2)
    assert first["norms"] == second["norms"]
    for name in SHAPES:
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], single["weights"][name], rtol=1e-5, atol=1e-6)
    for alone, both in zip(single["norms"], first["norms"], strict=True):
        assert both == pytest.approx(math.sqrt(alone**2 + 4.0), rel=1e-5)  # the second rank's expert: four gradients of 1
    assert first["bytes"] < 0.7 * single["bytes"]
