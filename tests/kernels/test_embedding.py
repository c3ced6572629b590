from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from miles_plan.kernels.collectives import RankGroup
from miles_plan.kernels.embedding import embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_vocabulary_gives_the_rows_of_the_whole_table(
    dtype: torch.dtype, run_ranks: Callable[[int, Callable[[RankGroup], Any]], list[Any]]
) -> None:
    table = torch.randn(11, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.tensor([10, 0, 3, 3, 7, 4])

    def own_part(group: RankGroup) -> tuple[Tensor, Tensor | None]:
        own = slice(0, 6) if group.rank == 0 else slice(6, 11)
        shard = table[own].clone().requires_grad_()
        rows = embedding(ids, shard, vocab_start=own.start, group=group)
        rows.sum().backward()
        return rows.detach(), shard.grad

    results = run_ranks(2, own_part)
    for rows, _ in results:
        assert torch.equal(rows, table[ids])
    grads = torch.cat([grad for _, grad in results])
    assert torch.equal(grads[:, 0], torch.tensor([1, 0, 0, 2, 1, 0, 0, 1, 0, 0, 1]).to(dtype))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="token_ids must be int64"):
        embedding(torch.ones(3, dtype=torch.int32), torch.ones(4, 2))
