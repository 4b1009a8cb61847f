"""Zig-zag: every row once, equal work, whatever the lengths."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trireme.core.step import Regime
from trireme.parallel.collectives import picked
from trireme.parallel.deal import Deal
from trireme.parallel.mesh import Span
from trireme.parallel.plan import Plan
from trireme.parallel.zigzag import chunks_of, rows_of, whole, zigzag


def test_the_picture_of_the_docstring():
    counts = np.array([8])
    assert [rows_of(zigzag(counts, 2, rank), counts).tolist() for rank in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_two_items_of_odd_lengths():
    counts = np.array([9, 5])
    assert rows_of(zigzag(counts, 2, 0), counts).tolist() == [0, 1, 6, 7, 8, 9, 12, 13]
    assert rows_of(zigzag(counts, 2, 1), counts).tolist() == [2, 3, 4, 5, 10, 11]
    chunks = zigzag(counts, 2, 1)
    assert (chunks.items.tolist(), chunks.begins.tolist(), chunks.counts.tolist()) == ([0, 0, 1, 1], [2, 4, 1, 2], [2, 2, 1, 1])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 8))
def test_every_row_is_dealt_once(counts, num_ranks):
    counts = np.array(counts)
    dealt = np.concatenate([rows_of(zigzag(counts, num_ranks, rank), counts) for rank in range(num_ranks)])
    assert sorted(dealt.tolist()) == list(range(counts.sum()))
    assert rows_of(whole(counts), counts).tolist() == list(range(counts.sum()))


def test_chunks_of_rows():
    chunks = chunks_of(np.array([8, 13, 0, 1, 4, 9]), np.array([9, 5]))
    assert (chunks.items.tolist(), chunks.begins.tolist(), chunks.counts.tolist()) == ([0, 1, 0, 0, 1], [8, 4, 0, 4, 0], [1, 1, 2, 1, 1])
    assert [len(each) for each in chunks_of(np.zeros(0, np.int64), np.array([9, 5]))] == [0, 0, 0]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.data())
def test_chunks_of_any_rows_are_these_rows(counts, data):
    rows = np.array(data.draw(st.permutations(range(sum(counts)))), np.int64)[: data.draw(st.integers(0, sum(counts)))]
    chunks = chunks_of(rows, np.array(counts))
    assert rows_of(chunks, np.array(counts)).tolist() == rows.tolist()
    assert (chunks.counts > 0).all() and (chunks.begins + chunks.counts <= np.array(counts)[chunks.items]).all()


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("prefix", [0, 100])
def test_causal_work_is_equal(num_ranks, prefix):
    """What a rank's queries see. Where 2 n parts are equal it is equal to the key; a row more here or there weighs what it sees."""
    for length, most_apart in ((16 * num_ranks, 0), (16 * num_ranks + 5, 2 * (16 * num_ranks + 5 + prefix))):
        counts, seen = np.array([length]), prefix + 1 + np.arange(length)  # keys, by row
        work = [int(seen[rows_of(zigzag(counts, num_ranks, rank), counts)].sum()) for rank in range(num_ranks)]
        assert max(work) - min(work) <= most_apart


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.sampled_from([(2, 2), (4, 2), (3, 1), (1, 4)]), st.booleans())
def test_a_deal_gives_every_row_to_one_rank_of_the_finest_cut(counts, shape, cut_context):
    tp, cp = shape
    plan = Plan(layer_cut=(1,), tp=tp, cp=cp)
    regime = Regime(cp=cut_context and cp > 1)
    finest = (Span(1, tp), Span(tp, tp * cp))
    dealt = [Deal(plan, rank, np.array(counts), regime).rows(finest) for rank in range(plan.ranks)]
    assert sorted(np.concatenate(dealt).tolist()) == list(range(sum(counts)))


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.sampled_from([(2, 2), (4, 2), (3, 1), (1, 4), (1, 1)]),
    st.booleans(),
    st.sampled_from([0, 5]),
    st.data(),
)
def test_heads_stay_where_they_were(counts, shape, cut_context, strip_rows, data):
    tp, cp = shape
    plan = Plan(layer_cut=(1,), tp=tp, cp=cp, sp=tp > 1, strip_rows=strip_rows)
    regime = Regime(sp=plan.sp, cp=cut_context and cp > 1)
    asked = np.array(data.draw(st.permutations(range(sum(counts)))), np.int64)[: data.draw(st.integers(0, sum(counts)))]
    for cut in ((), (Span(1, tp),), (Span(tp, tp * cp),), (Span(1, tp), Span(tp, tp * cp))):
        times = np.zeros(len(asked), np.int64)
        for rank in range(plan.ranks):
            deal = Deal(plan, rank, np.array(counts), regime, head_rows=asked)
            if (heads := deal.heads) is None:
                assert asked.tolist() == list(range(sum(counts)))
                return
            had = torch.from_numpy(deal.rows(cut))
            assert picked(had, heads.places(cut)).tolist() == asked[heads.rows(cut)].tolist()
            assert rows_of(heads.chunks, np.array(counts)).tolist() == asked[heads.own()].tolist()
            times[heads.rows(cut)] += 1
        assert (times == plan.ranks // prod(span.size for span in cut)).all()
