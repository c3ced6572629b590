from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_plan.backends.torch_engine.mesh import open_mesh
from miles_plan.backends.torch_engine.pipeline import (
    StageLinks,
    one_forward_one_backward,
    run_forward,
    run_forward_backward,
)
from miles_plan.ir.layout import TrainLayout

WIDTH = 8
ROWS = [3, 0, 5, 2, 4]


def test_order_of_each_stage_by_hand():
    text = [" ".join(f"{kind[0]}{index}" for kind, index in one_forward_one_backward(stage, 3, 4)) for stage in range(3)]
    assert text == ["f0 f1 f2 b0 f3 b1 b2 b3", "f0 f1 b0 f2 b1 f3 b2 b3", "f0 b0 f1 b1 f2 b2 f3 b3"]


@given(st.integers(1, 6), st.integers(0, 8))
def test_every_pass_once_and_few_micro_batches_alive(stages, micro_batches):
    for stage in range(stages):
        alive, most, seen = set(), 0, []
        for kind, index in one_forward_one_backward(stage, stages, micro_batches):
            seen.append((kind, index))
            (alive.add if kind == "forward" else alive.remove)(index)
            most = max(most, len(alive))
        assert sorted(seen) == sorted((kind, index) for kind in ("forward", "backward") for index in range(micro_batches))
        assert most == min(stages - stage, micro_batches)


def layers() -> list[torch.nn.Linear]:
    torch.manual_seed(0)
    return [torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)]


def run(rank: int, rendezvous: str | None, stages: int) -> dict[str, object]:
    """Four layers over the stages; the loss is the sum of the last layer's squares."""
    mesh = open_mesh(TrainLayout(pp=stages), rank, rendezvous=rendezvous, timeout_s=60)
    links = StageLinks(mesh.pp, torch.float32, WIDTH)
    per_stage = 4 // stages
    own = layers()[links.stage * per_stage : (links.stage + 1) * per_stage]
    inputs = [torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(index)) for index, rows in enumerate(ROWS)]

    def hidden_states(index: int, hidden: torch.Tensor | None) -> torch.Tensor:
        state = inputs[index] if hidden is None else hidden
        for layer in own:
            state = torch.tanh(layer(state))
        return state

    def loss(index: int, hidden: torch.Tensor | None) -> torch.Tensor:
        state = hidden_states(index, hidden)
        return state.square().sum() if links.is_last else state

    with torch.no_grad():
        outputs = run_forward(links, ROWS, hidden_states)
    run_forward_backward(links, ROWS, loss)
    mesh.close()
    return {"outputs": outputs, "gradients": [layer.weight.grad for layer in own]}


@pytest.mark.parametrize("stages", [2, 4])
def test_stages_compute_what_one_process_computes(ranks, stages):
    single = run(0, None, 1)
    parts = ranks.run(run, stages, stages)
    assert all(not part["outputs"] for part in parts[:-1])
    for whole, piece in zip(single["outputs"], parts[-1]["outputs"], strict=True):
        assert torch.equal(whole, piece)
    gradients = [gradient for part in parts for gradient in part["gradients"]]
    for whole, piece in zip(single["gradients"], gradients, strict=True):
        torch.testing.assert_close(whole, piece)
