from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from miles_plan.backends.megatron_engine.routing_replay import RoutingReplay


def choose(scores: torch.Tensor, k: int, num_groups: Any = None, group_topk: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.topk(scores, k)
    return found.values, found.indices


def ask(router: Any, scores: torch.Tensor) -> list[list[int]]:
    values, experts = router.router_replay.get_replay_topk(scores, 2, None, None, choose)
    assert (values == scores.gather(1, experts)).all()
    return [sorted(row) for row in experts.tolist()]


def test_each_micro_batch_is_recomputed_with_its_own_record():
    replay, routers = RoutingReplay(), [SimpleNamespace(), SimpleNamespace()]
    replay.attach(enumerate(routers))
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    records = [torch.tensor([[[0, 1], [2, 3]], [[1, 0], [0, 2]]]), torch.tensor([[[0, 2], [0, 3]], [[1, 3], [1, 2]]])]
    counted = torch.tensor([True, True])
    forward = []
    for record in records:  # two forwards before a backward, as a pipeline runs them
        replay.begin(record, counted, [0, 1])
        forward.append([ask(router, scores) for router in routers])
        replay.end()
    for index, record in enumerate(records):
        again = [ask(router, scores) for router in reversed(routers)]
        assert again == list(reversed(forward[index]))
        assert forward[index] == [[sorted(row) for row in record[:, layer].tolist()] for layer in (0, 1)]
    assert replay.compared == 8  # recomputation is not counted again
    assert replay.mismatches == 6  # the router's own: [2, 3] for the first token, [0, 1] for the second


def test_padding_is_not_counted_and_without_a_record_routers_choose():
    replay, router = RoutingReplay(), SimpleNamespace()
    replay.attach([(0, router)])
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    replay.begin(torch.tensor([[[0, 1]], [[2, 3]]]), torch.tensor([True, False]), [0])
    ask(router, scores)
    replay.end()
    assert (replay.mismatches, replay.compared) == (1, 1)
    replay.reset()
    replay.begin(None, torch.tensor([True, True]), [0])
    assert ask(router, scores) == [[2, 3], [0, 1]]
    replay.end()
    assert (replay.mismatches, replay.compared) == (0, 0)
    assert ask(router, scores) == [[2, 3], [0, 1]]  # recomputed


def test_only_the_chunk_that_runs_gets_a_record():
    replay, routers = RoutingReplay(), [SimpleNamespace(), SimpleNamespace()]
    replay.attach(enumerate(routers))
    replay.begin(torch.zeros(1, 2, 2, dtype=torch.int64), torch.tensor([True]), [1])
    replay.end()
    assert [len(router.router_replay.waiting) for router in routers] == [0, 1]
