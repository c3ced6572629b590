"""Several ranks of one engine as threads: groups are objects here, so ranks need no process of their own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from miles_plan.kernels.collectives import RankGroup, open_group


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[[int, Callable[[RankGroup], Any]], list[Any]]:
    """run_ranks(size, function): what `function(group)` returns on each rank of a new group."""
    calls = iter(range(1000))

    def run(size: int, function: Callable[[RankGroup], Any]) -> list[Any]:
        path = str(tmp_path / f"store-{next(calls)}")

        def rank_main(rank: int) -> Any:
            store = dist.FileStore(path, size)
            group = open_group(store, "tp", range(size), rank, host="127.0.0.1", timeout_s=30)
            try:
                return function(group)
            finally:
                group.close()

        with ThreadPoolExecutor(size) as threads:
            return list(threads.map(rank_main, range(size)))

    return run
