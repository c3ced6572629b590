"""The draft as the rollout engine holds it: its weights, its layer of the KV cache, and the tokens it proposes.

Its cache has the policy's pages and positions, so prompts are shared, pages copied and samples retracted without a word from
here. It follows every forward of the policy: what it guessed on the way to a proposal is overwritten with what was so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from miles_plan.backends.torch_engine.decoder import Decoder, PagedBatch
from miles_plan.backends.torch_engine.draft import PREFIX, Draft, states_before
from miles_plan.backends.torch_engine.feeds import Feed, first_rows, paged_batch
from miles_plan.backends.torch_engine.kv_cache import KvPool
from miles_plan.backends.torch_engine.options import RolloutEngineOptions
from miles_plan.backends.torch_engine.prepared import PreparedWeights
from miles_plan.backends.torch_engine.scheduler import FedSequence, Sample
from miles_plan.backends.torch_engine.weights import Weights

Choose = Callable[[Sequence[Sample], Sequence[int], Tensor], Sequence[int]]


class DraftDecoder:
    """The draft of the policy that `decoder` runs with `weights`, both the engine's."""

    def __init__(
        self, options: RolloutEngineOptions, decoder: Decoder, weights: Weights, prepared: PreparedWeights, *, num_pages: int
    ) -> None:
        self._options = options
        self._policy, self._policy_weights, self._policy_prepared = decoder, weights, prepared
        self._draft = Draft(decoder.config, device=options.device)
        dtype = getattr(torch, options.dtype)
        self.weights = self._draft.initial_weights(options.seed, dtype=dtype, device=options.device)
        self.prepared = PreparedWeights()
        self.pool = KvPool(
            num_layers=1,
            num_pages=num_pages,
            kv_heads=decoder.config.num_kv_heads,
            page_tokens=options.page_tokens,
            head_dim=decoder.config.head_dim,
            device=options.device,
        )

    @property
    def names(self) -> set[str]:
        """The tensors that every version must bring."""
        return {PREFIX + name for name in self.weights}

    def take(self, name: str, full: Tensor) -> None:
        """Copy a tensor that arrived into its place. ValueError when its shape is not the draft's."""
        own = self.weights[name.removeprefix(PREFIX)]
        if full.shape != own.shape:
            raise ValueError(f"weight '{name}' has shape {list(full.shape)}, the draft expects {list(own.shape)}")
        own.copy_(full)

    def follow(self, feeds: Sequence[Feed], batch: PagedBatch, states: Tensor) -> None:
        """Run over what the policy was fed, whose hidden states [M, H] this gave; fills the cache."""
        starts = torch.from_numpy(first_rows(feeds)).to(states.device)
        first = torch.stack([self._state_of(feed.sequence, states) for feed in feeds])
        self._forward(batch, states_before(states, starts, first))

    def propose(self, samples: Sequence[Sample], counts: Sequence[int], choose: Choose) -> list[list[int]]:
        """As many tokens as `counts` says after each sample's last, which is not yet cached.

        choose(samples, positions, logits) draws the token at each position from this rank's logits. Collective over tp.
        """
        proposed: list[list[int]] = [[] for _ in samples]
        states = {row: sample.state for row, sample in enumerate(samples)}
        for step in range(max(counts, default=0)):
            rows = [row for row, count in enumerate(counts) if count > step]
            feeds = [
                Feed(samples[row], samples[row].num_cached + step, [(proposed[row] or samples[row].tokens)[-1]]) for row in rows
            ]
            batch = paged_batch(feeds, page_tokens=self._options.page_tokens, device=self._options.device)
            hidden = self._forward(batch, torch.stack([states[row] for row in rows]))
            logits = self._policy.logits(self._policy_weights, self._policy_prepared, hidden)
            chosen = choose([samples[row] for row in rows], [feed.start + 1 for feed in feeds], logits)
            for row, token, state in zip(rows, chosen, hidden, strict=True):
                proposed[row].append(token)
                states[row] = state
        return proposed

    def _forward(self, batch: PagedBatch, states: Tensor) -> Tensor:
        embedded = self._policy.embed(self._policy_weights, batch.tokens)
        return self._draft.forward_paged(self.weights, self.prepared, states, embedded, batch, self.pool.layers[0])

    def _state_of(self, sequence: FedSequence, like: Tensor) -> Tensor:
        """The policy's state at the sequence's last cached token, zeros before the first."""
        state: Tensor | None = sequence.state
        return torch.zeros_like(like[0]) if state is None else state


def accepted(proposed: Sequence[int], drawn: Sequence[int]) -> int:
    """How many of the tokens drawn stand: one beyond the longest prefix in which the proposal was right."""
    right = 0
    while right < len(proposed) and proposed[right] == drawn[right]:
        right += 1
    return right + 1
