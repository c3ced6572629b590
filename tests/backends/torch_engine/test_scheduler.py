"""The scheduler against a model of the cache that knows, for every slot of every page, which token of which text it holds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.backends.torch_engine.kv_cache import OutOfPagesError, PageAllocator
from miles_plan.backends.torch_engine.scheduler import FedSequence, Sample, Scheduler, Step

PAGE_TOKENS = 4


class Cache:
    """Contents of each page: for each slot the whole text up to the token held there, so equal entries mean equal keys."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}

    def copy(self, source: int, target: int) -> None:
        for offset in range(PAGE_TOKENS):
            if (source, offset) in self.slots:
                self.slots[target, offset] = self.slots[source, offset]

    def feed(self, sequence: FedSequence, count: int) -> None:
        for position in range(sequence.num_cached, sequence.num_cached + count):
            page = sequence.pages[position // PAGE_TOKENS]
            self.slots[page, position % PAGE_TOKENS] = tuple(sequence.tokens[: position + 1])

    def check(self, sequence: FedSequence) -> None:
        for position in range(sequence.num_cached):
            page = sequence.pages[position // PAGE_TOKENS]
            assert self.slots[page, position % PAGE_TOKENS] == tuple(sequence.tokens[: position + 1])


def run(
    prompts: list[tuple[int, ...]],
    lengths: list[int],
    num_pages: int,
    *,
    max_running: int = 8,
    chunk: int = 6,
    sharing: bool = True,
) -> tuple[list[Sample], int, int]:
    """Generate `lengths[i]` tokens for prompt i; the samples, the steps taken and the retractions."""
    allocator = PageAllocator(num_pages)
    scheduler = Scheduler(
        allocator, page_tokens=PAGE_TOKENS, max_running=max_running, prefill_tokens=chunk, prefix_sharing=sharing
    )
    samples = scheduler.add(prompts, max(lengths))
    cache, steps = Cache(), 0
    while scheduler.unfinished:
        steps += 1
        assert steps < 10_000, "no end in sight"
        step = scheduler.next_step()
        assert scheduler.num_running <= max_running
        assert sum(count for _, count in step.prefill) <= chunk
        for sample in run_step(scheduler, cache, step):
            token = 1000 * (sample.index + 1) + sample.num_response
            scheduler.append(sample, token, finished=sample.num_response + 1 >= lengths[sample.index])
    scheduler.close()
    assert allocator.num_free == num_pages, "pages leak"
    return samples, steps, scheduler.num_retracted


def run_step(scheduler: Scheduler, cache: Cache, step: Step) -> list[Sample]:
    for source, target in step.copies:
        cache.copy(source, target)
    drawing = list(step.fresh)
    for sequence, count in [*step.prefill, *((sample, 1) for sample in step.decode)]:
        cache.check(sequence)
        cache.feed(sequence, count)
        scheduler.fed(sequence, count)
        if isinstance(sequence, Sample) and not sequence.num_pending:
            drawing.append(sequence)
    for sample in drawing:
        cache.check(sample)
        assert sample.num_cached == len(sample.tokens)
    return drawing


@settings(deadline=None, max_examples=150)
@given(
    texts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=13).map(tuple), min_size=1, max_size=4),
    which=st.lists(st.integers(0, 3), min_size=1, max_size=14),
    data=st.data(),
    max_running=st.integers(1, 9),
    chunk=st.integers(1, 30),
    sharing=st.booleans(),
)
def test_every_sample_finishes_and_reads_only_its_own_text(
    texts: list[tuple[int, ...]], which: list[int], data: st.DataObject, max_running: int, chunk: int, sharing: bool
) -> None:
    prompts = [texts[index % len(texts)] for index in which]
    lengths = [data.draw(st.integers(1, 12)) for _ in prompts]
    least = max(-(-(len(prompt) + max(lengths)) // PAGE_TOKENS) + 1 for prompt in prompts)
    num_pages = data.draw(st.integers(least, least + 30))
    samples, _, _ = run(prompts, lengths, num_pages, max_running=max_running, chunk=chunk, sharing=sharing)
    for sample, prompt, length in zip(samples, prompts, lengths, strict=True):
        response = [1000 * (sample.index + 1) + number for number in range(length)]
        assert sample.tokens == [*prompt, *response]


def test_a_shared_prompt_is_fed_once_and_its_full_pages_are_shared() -> None:
    allocator = PageAllocator(100)
    scheduler = Scheduler(allocator, page_tokens=PAGE_TOKENS, max_running=8, prefill_tokens=100, prefix_sharing=True)
    samples = scheduler.add([(1,) * 10] * 3, 5)
    cache = Cache()
    first = scheduler.next_step()
    assert [count for _, count in first.prefill] == [10]
    run_step(scheduler, cache, first)
    second = scheduler.next_step()
    assert second.fresh == tuple(samples)
    assert len(second.copies) == 2  # the last sample takes the prompt's own partial page
    assert all(sample.pages[:2] == samples[0].pages[:2] for sample in samples)
    assert len({sample.pages[2] for sample in samples}) == 3
    assert 100 - allocator.num_free == 2 + 3


def test_a_small_pool_retracts_and_still_finishes() -> None:
    prompts = [(number,) * 5 for number in range(6)]
    _, _, retracted = run(prompts, [20] * 6, num_pages=10)
    assert retracted > 0
    _, _, none = run(prompts, [20] * 6, num_pages=100)
    assert none == 0


def test_a_retracted_sample_with_one_token_beyond_its_prompt_goes_on() -> None:
    samples, _, retracted = run([(0,) * 7] * 6, [1, 3, 3, 3, 2, 2], num_pages=8, max_running=5, chunk=1)
    assert retracted > 0
    assert [len(sample.tokens) for sample in samples] == [8, 10, 10, 10, 9, 9]


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(OutOfPagesError, match="a prompt of 30 and a response of 20 tokens need 14 pages of 4 tokens"):
        run([(1,) * 30], [20], num_pages=13)
