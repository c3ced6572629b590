from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from miles_plan.backends.torch_engine.kv_cache import FILLER_PAGE, KvPool, OutOfPagesError, PageAllocator

NUM_PAGES = 7


class AllocatorAgainstAModel(RuleBasedStateMachine):
    """Any order of allocate, share and release, against a multiset of holders."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES)
        self.model: Counter[int] = Counter()

    @rule(target=held, count=st.integers(0, 3))
    def allocate(self, count: int) -> object:
        if count > NUM_PAGES - len(+self.model):
            with pytest.raises(OutOfPagesError, match=f"of {NUM_PAGES} are free"):
                self.allocator.allocate(count)
            return multiple()
        pages = self.allocator.allocate(count)
        assert len(set(pages)) == count
        assert not any(self.model[page] for page in pages)
        self.model.update(pages)
        return tuple(pages)

    @rule(target=held, pages=held)
    def share(self, pages: tuple[int, ...]) -> tuple[int, ...]:
        self.allocator.share(pages)
        self.model.update(pages)
        return pages

    @rule(pages=consumes(held))
    def release(self, pages: tuple[int, ...]) -> None:
        self.allocator.release(pages)
        self.model.subtract(pages)

    @invariant()
    def holders_and_free_pages_agree(self) -> None:
        assert self.allocator.num_free == NUM_PAGES - len(+self.model)
        assert all(self.allocator.holders(page) == self.model[page] for page in range(1, NUM_PAGES + 1))


AllocatorAgainstAModel.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_allocator = AllocatorAgainstAModel.TestCase


def test_a_free_page_is_neither_shared_nor_released() -> None:
    allocator = PageAllocator(2)
    (page,) = allocator.allocate(1)
    allocator.release([page])
    with pytest.raises(ValueError, match=f"page {page} is free already"):
        allocator.release([page])
    with pytest.raises(ValueError, match=f"page {page} is free and cannot be shared"):
        allocator.share([page])


def test_the_filler_page_is_never_handed_out() -> None:
    assert FILLER_PAGE not in PageAllocator(5).allocate(5)


def test_copied_pages_are_equal_in_every_layer() -> None:
    pool = KvPool(num_layers=2, num_pages=4, kv_heads=2, page_tokens=3, head_dim=5)
    for tensor in pool.tensors:
        tensor.copy_(torch.rand(tensor.shape, dtype=tensor.dtype))
    before = [tensor.clone() for tensor in pool.tensors]
    pool.copy_pages([(1, 3), (2, 4)])
    for tensor, old in zip(pool.tensors, before, strict=True):
        assert torch.equal(tensor[3], old[1])
        assert torch.equal(tensor[4], old[2])
        assert torch.equal(tensor[:3], old[:3])
    assert pool.size_bytes == 2 * 5 * 2 * 3 * (5 + 5 + 1) * 8
