from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import Parameter

from miles_plan.backends.torch_engine.mesh import open_mesh
from miles_plan.backends.torch_engine.optimizer import ShardedAdamW, learning_rate
from miles_plan.backends.torch_engine.parameter_buffers import BufferedParameter, ParameterBuffer
from miles_plan.ir.layout import TrainLayout
from miles_plan.ir.options import OptimizerOptions
from miles_plan.kernels.collectives import RankGroup, single_rank

OPTIONS = OptimizerOptions(learning_rate=0.01, weight_decay=0.1, clip_grad_norm=0.5)
SHAPES = {"matrix": (5, 3), "norm": (3,), "other": (2, 4)}


def parameters(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return {name: Parameter(torch.randn(shape, generator=draw).to(dtype)) for name, shape in SHAPES.items()}


def buffered(owned: dict[str, Parameter], group: RankGroup | None = None, uncounted: str = "") -> ParameterBuffer:
    return ParameterBuffer(
        [
            BufferedParameter(name=name, parameter=each, counted=name != uncounted, decayed=each.ndim > 1)
            for name, each in owned.items()
        ],
        group or single_rank(),
    )


def loss_of(owned: dict[str, Parameter], seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return sum((each.float() * torch.randn(each.shape, generator=draw)).square().sum() for each in owned.values())


def test_same_steps_as_torch_adamw():
    ours, theirs = parameters(0), parameters(0)
    buffer = buffered(ours)
    optimizer = ShardedAdamW([buffer], single_rank())
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
        buffer.clear_gradients()
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
    owned = parameters(0, torch.bfloat16)
    buffer = buffered(owned)
    buffer.clear_gradients()
    for _ in range(300):
        (owned["norm"].sum() * 2**-7).backward()
    assert owned["norm"].grad is None
    view = dict(zip((each.name for each in buffer.parameters), buffer.views(buffer.gradients), strict=True))["norm"]
    assert (view == 300 * 2**-7).all()  # bf16 would have stopped growing at 256 x 2**-7


def test_masters_keep_what_bf16_weights_cannot_hold():
    owned = parameters(0, torch.bfloat16)
    buffer = buffered(owned)
    optimizer = ShardedAdamW([buffer], single_rank())
    before = optimizer.tensors()["0.masters"].clone()
    buffer.clear_gradients()
    loss_of(owned, 0).backward()
    optimizer.step(replace(OPTIONS, learning_rate=1e-6))
    masters = optimizer.tensors()["0.masters"]
    assert (masters != before).any()
    assert torch.equal(masters.bfloat16(), buffer.weights)


def test_a_norm_that_is_not_finite_skips_the_step():
    owned = parameters(0)
    buffer = buffered(owned)
    optimizer = ShardedAdamW([buffer], single_rank())
    before, moments = buffer.weights.clone(), optimizer.tensors()["0.first_moment"].clone()
    for bad in (math.inf, math.nan):
        buffer.clear_gradients()
        (owned["norm"].sum() * bad).backward()
        metrics = optimizer.step(OPTIONS)
        assert metrics["skipped_steps"] == 1.0
        assert not math.isfinite(metrics["grad_norm"])
    assert torch.equal(buffer.weights, before)
    assert torch.equal(optimizer.tensors()["0.first_moment"], moments)
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (0, 2)


def test_weights_and_state_can_be_let_go_and_taken_back():
    owned = parameters(0)
    buffer = buffered(owned)
    optimizer = ShardedAdamW([buffer], single_rank())
    state = optimizer.tensors()
    optimizer.replace_tensors(None)
    flat = buffer.detach_weights()
    assert all(each.numel() == 0 for each in owned.values())
    buffer.attach_weights(flat)
    optimizer.replace_tensors(state)
    assert torch.equal(owned["matrix"], parameters(0)["matrix"])


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
    shared = parameters(0)
    own = {"expert": Parameter(torch.full((2, 2), 1.0 + rank)), "norm": Parameter(torch.ones(3))}
    buffers = [buffered(shared, mesh.dp), buffered(own, uncounted="norm" if rank else "")]
    optimizer = ShardedAdamW(buffers, mesh.world)
    norms = []
    for step in range(3):
        for buffer in buffers:
            buffer.clear_gradients()
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
