"""Continuous batching without a model: who is admitted, fed, grown, retracted and finished, step by step.

A pure function of the requests and of the tokens fed back, so tensor-parallel ranks agree without talking. A prompt is fed
once; its samples then fork from it: they share its full pages and copy the last one if it is partly filled. When pages run
out the youngest sample is retracted: its pages go, its tokens stay, and it is fed again later, to the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from miles_plan.backends.torch_engine.kv_cache import OutOfPagesError, PageAllocator


@dataclass(slots=True, eq=False)
class FedSequence:
    """Tokens, how many of them the KV cache holds, and in which pages; pages cover at least the tokens held.

    `state` is the engine's: what it keeps of the last token held, None while there is none.
    """

    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    state: Any = None

    @property
    def num_pending(self) -> int:
        """Tokens known and not yet fed."""
        return len(self.tokens) - self.num_cached


@dataclass(slots=True, eq=False)
class Prompt(FedSequence):
    """A prompt being fed, or fed and kept for its samples. `result` is the engine's: what its samples start from."""

    key: Hashable = None
    result: Any = None


@dataclass(slots=True, eq=False)
class Sample(FedSequence):
    """One request: `tokens` begins with its prompt. `prompt` is what it forked from, while it runs."""

    index: int = 0
    num_prompt: int = 0
    key: Hashable = None
    prompt: Prompt | None = None

    @property
    def num_response(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the engine, in this order: copy pages, feed `prefill` (tokens of each), feed `decode` (one token of each).

    drafts: how many tokens beyond its own each sample of `decode` has room for, to be fed with it on trial. Then a next token
    is drawn for `fresh` samples (from their prompt's last token), for samples whose prefill ends here, and for `decode`.
    Prompts whose feeding ends here keep the result of their last token for their samples.
    """

    copies: tuple[tuple[int, int], ...]
    fresh: tuple[Sample, ...]
    prefill: tuple[tuple[FedSequence, int], ...]
    decode: tuple[Sample, ...]
    drafts: tuple[int, ...]


class Scheduler:
    """State of one `generate` call. `next_step`, then `fed` and `append` for what was done, until `unfinished` is false."""

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        page_tokens: int,
        max_running: int,
        prefill_tokens: int,
        prefix_sharing: bool,
        draft_tokens: int = 0,
    ) -> None:
        """`draft_tokens`: most tokens that a draft proposes for a sample in one step."""
        self._allocator = allocator
        self._page_tokens = page_tokens
        self._max_running = max_running
        self._prefill_tokens = prefill_tokens
        self._prefix_sharing = prefix_sharing
        self._draft_tokens = draft_tokens
        self._max_response = 0
        self._waiting: list[Sample] = []
        self._running: dict[int, Sample] = {}  # by index, oldest first
        self._prompts: dict[Hashable, Prompt] = {}
        self._subscribers: Counter[Hashable] = Counter()
        self.num_retracted = 0

    @property
    def unfinished(self) -> bool:
        """Whether a sample still waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        """Samples that hold a place in the batch."""
        return len(self._running)

    def add(self, prompts: Sequence[Sequence[int]], max_response: int) -> list[Sample]:
        """Queue one sample a prompt. OutOfPagesError when a sample could not finish even alone in the pool."""
        samples = []
        self._max_response = max_response
        for tokens in prompts:
            need = self._pages_for(len(tokens) + max_response) + 1
            if need > self._allocator.num_pages:
                raise OutOfPagesError(
                    f"a prompt of {len(tokens)} and a response of {max_response} tokens need {need} pages of "
                    f"{self._page_tokens} tokens, the pool has {self._allocator.num_pages}"
                )
            index = len(self._waiting)
            key: Hashable = tuple(tokens) if self._prefix_sharing else index
            sample = Sample(list(tokens), index=index, num_prompt=len(tokens), key=key)
            self._subscribers[key] += 1
            self._waiting.append(sample)
            samples.append(sample)
        return samples

    def next_step(self) -> Step:
        """What to do now; at least one token is fed or one fresh sample started."""
        decode = self._grow()
        drafts = [self._grow_for_draft(sample) for sample in decode]
        copies: list[tuple[int, int]] = []
        fresh = self._admit(copies)
        if not (self._running or any(prompt.num_pending for prompt in self._prompts.values())):
            self._drop_prompts(keep=self._waiting[0].key)
            fresh = self._admit(copies)
        step = Step(tuple(copies), tuple(fresh), tuple(self._choose_prefill(decode)), tuple(decode), tuple(drafts))
        assert step.fresh or step.prefill or step.decode, "the scheduler stands still"
        return step

    def fed(self, sequence: FedSequence, num_tokens: int) -> None:
        """These tokens' keys and values are in the cache now."""
        sequence.num_cached += num_tokens

    def append(self, sample: Sample, token: int, *, finished: bool) -> None:
        """A drawn token; a finished sample leaves the batch and its pages."""
        sample.tokens.append(token)
        if finished:
            del self._running[sample.index]
            self._allocator.release(sample.pages)
            sample.pages = []

    def close(self) -> None:
        """Give every page back, whatever was left undone."""
        self._drop_prompts(keep=None)
        for sample in self._running.values():
            self._allocator.release(sample.pages)
            sample.pages = []
        self._running, self._waiting = {}, []

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_tokens)

    def _grow(self) -> list[Sample]:
        """Samples with one token to feed, each with a page for it; the oldest are served first."""
        decode = []
        for sample in list(self._running.values()):
            if sample.index not in self._running or sample.num_pending != 1:
                continue
            if sample.num_cached == len(sample.pages) * self._page_tokens:
                self._make_room(1)
                if sample.index not in self._running:
                    continue
                sample.pages += self._allocator.allocate(1)
            decode.append(sample)
        return [sample for sample in decode if sample.index in self._running]

    def _grow_for_draft(self, sample: Sample) -> int:
        """Tokens to draft for a sample: no more than it may still need, in pages that are free anyway."""
        wanted = min(self._draft_tokens, self._max_response - sample.num_response - 1)
        if wanted < 1:
            return 0
        missing = self._pages_for(sample.num_cached + 1 + wanted) - len(sample.pages)
        sample.pages += self._allocator.allocate(max(0, min(missing, self._allocator.num_free)))
        return min(wanted, len(sample.pages) * self._page_tokens - sample.num_cached - 1)

    def _make_room(self, count: int) -> None:
        """Free pages until `count` are: first prompts that can be fed again, newest first, then the youngest samples."""
        while self._allocator.num_free < count:
            if self._prompts:
                self._allocator.release(self._prompts.popitem()[1].pages)
            else:
                self._retract(self._running[next(reversed(self._running))])

    def _retract(self, sample: Sample) -> None:
        del self._running[sample.index]
        self._allocator.release(sample.pages)
        sample.pages, sample.num_cached, sample.prompt, sample.state = [], 0, None, None
        self._subscribers[sample.key] += 1
        self._waiting.insert(0, sample)
        self.num_retracted += 1

    def _admit(self, copies: list[tuple[int, int]]) -> list[Sample]:
        """Start waiting samples whose prompts are fed, and begin prompts, in request order as far as room goes."""
        fresh, started = [], set()
        budget = self._prefill_tokens - sum(prompt.num_pending for prompt in self._prompts.values())
        room = self._max_running - len(self._running)
        for sample in self._waiting[: max(0, room)]:
            prompt = self._prompts.get(sample.key)
            if prompt is None:
                if budget <= 0 or (prompt := self._begin_prompt(sample)) is None:
                    break
                budget -= prompt.num_pending
            if prompt.num_pending:
                continue
            if not self._start(sample, prompt, copies):
                break
            started.add(sample.index)
            if not sample.num_pending:
                fresh.append(sample)
        self._waiting = [sample for sample in self._waiting if sample.index not in started]
        return fresh

    def _begin_prompt(self, sample: Sample) -> Prompt | None:
        tokens = sample.tokens[: sample.num_prompt]
        need = self._pages_for(len(tokens))
        if not self._has_room(need):
            return None
        prompt = Prompt(tokens, pages=self._allocator.allocate(need), key=sample.key)
        self._prompts[sample.key] = prompt
        return prompt

    def _start(self, sample: Sample, prompt: Prompt, copies: list[tuple[int, int]]) -> bool:
        """Fork from the prompt, with pages for all tokens known; the last subscriber takes the prompt's pages over."""
        shared = len(prompt.tokens) // self._page_tokens
        takes_over = self._subscribers[sample.key] == 1
        extra = self._pages_for(len(sample.tokens)) - (len(prompt.pages) if takes_over else shared)
        if not self._has_room(extra):
            return False
        if takes_over:
            sample.pages = prompt.pages + self._allocator.allocate(extra)
            del self._prompts[sample.key]
        else:
            self._allocator.share(prompt.pages[:shared])
            own = self._allocator.allocate(extra)
            sample.pages = prompt.pages[:shared] + own
            if len(prompt.tokens) % self._page_tokens:
                copies.append((prompt.pages[shared], own[0]))
        self._subscribers[sample.key] -= 1
        sample.num_cached, sample.prompt, sample.state = len(prompt.tokens), prompt, prompt.state
        self._running[sample.index] = sample
        return True

    def _has_room(self, pages: int) -> bool:
        """Room for `pages` and, so that admission does not soon force a retraction, one page for every other running sample."""
        return self._allocator.num_free >= pages + (len(self._running) + 1) // 2

    def _drop_prompts(self, keep: Hashable) -> None:
        for key in [key for key in self._prompts if key != keep]:
            self._allocator.release(self._prompts.pop(key).pages)

    def _choose_prefill(self, decode: Sequence[Sample]) -> list[tuple[FedSequence, int]]:
        """Prompts and retracted samples with tokens to feed, oldest first, up to the chunk's tokens.

        A retracted sample that starts again with one token beyond its prompt came too late for `decode`.
        """
        chosen: list[tuple[FedSequence, int]] = []
        left = self._prefill_tokens
        decoding = {sample.index for sample in decode}
        catching_up = [each for each in self._running.values() if each.num_pending and each.index not in decoding]
        for sequence in [*catching_up, *self._prompts.values()]:
            if left and sequence.num_pending:
                count = min(left, sequence.num_pending)
                chosen.append((sequence, count))
                left -= count
        return chosen
