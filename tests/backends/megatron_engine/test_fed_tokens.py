from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_plan.backends.megatron_engine.fed_tokens import feed, padded_tokens
from miles_plan.backends.training.packed_samples import PackedSamples, pack_samples, predicting_nothing
from tests.backends.sample_trainers import random_batch

ANSWERED = np.array([0, 1, 2, 3, 5, 6])


def part(seed: int) -> PackedSamples:
    return pack_samples(random_batch(seed=seed), ANSWERED, replay_routing=False)


@given(st.integers(0, 20), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_ranks_share_every_token_and_every_prediction_once(seed, cp, multiple):
    packed = part(seed)
    feds = [feed(packed, multiple=multiple, cp=cp, cp_rank=rank) for rank in range(cp)]
    sources = torch.cat([each.source for each in feds])
    assert sorted(sources[sources >= 0].tolist()) == list(range(len(packed.tokens)))
    predicted = torch.cat([each.predicted for each in feds])
    assert sorted(predicted.tolist()) == list(range(len(packed.targets)))
    for each in feds:
        assert len(each.tokens) % multiple == 0
        assert len(each.tokens) * cp == int(each.cumulative_lengths[-1]) == padded_tokens(packed, multiple=multiple, cp=cp)
        assert (each.source[each.predicting] == packed.predicting[each.predicted]).all()
        real = each.source >= 0
        assert (each.tokens[real] == packed.tokens[each.source[real]]).all()
        assert int((each.cumulative_lengths[1:] - each.cumulative_lengths[:-1]).max()) == each.longest


def test_one_rank_without_padding_feeds_what_was_packed():
    packed = part(0)
    fed = feed(packed, multiple=1)
    assert (fed.tokens == packed.tokens).all()
    assert fed.cumulative_lengths.tolist() == [0, *np.cumsum(packed.sequences.lengths).tolist()]


def test_context_parallel_ranks_take_a_front_and_a_back_chunk():
    batch = random_batch().select([1])
    packed = pack_samples(batch, np.array([0]), replay_routing=False)
    count = len(packed.tokens)
    chunk = -(-count // 4)
    first = feed(packed, multiple=1, cp=2, cp_rank=0).source
    assert first[0] == 0
    assert first[:chunk].tolist() == list(range(chunk))
    assert all(source == -1 or source >= 3 * chunk for source in first[chunk:].tolist())


def test_filling_up_adds_one_sequence_of_padding():
    packed = part(0)
    fed = feed(packed, multiple=1, at_least=len(packed.tokens) + 7)
    assert int(fed.cumulative_lengths[-1]) == len(packed.tokens) + 7
    assert (fed.source[-7:] == -1).all()


def test_a_part_that_predicts_nothing_feeds_its_tokens_still():
    fed = feed(predicting_nothing(part(0)), multiple=2)
    assert len(fed.tokens)
    assert not len(fed.predicting)
    assert not len(fed.predicted)
