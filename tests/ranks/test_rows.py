"""A Step laid out by arrays equals one laid out by hand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trireme.core.step import PAGE, Step, ints
from trireme.ranks.rows import lay_out


@st.composite
def items(draw):
    slots = draw(st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True))
    counts = [draw(st.integers(1, 40)) for _ in slots]
    return [(slot, draw(st.integers(0, 60)), count, draw(st.integers(0, count))) for slot, count in zip(slots, counts, strict=True)]


@given(items())
def test_rows_by_hand(items):
    page_table = np.random.default_rng(0).permutation(8 * 7).astype(np.int32).reshape(8, 7)
    slots, starts, counts, samples = zip(*items, strict=True)
    tokens = np.arange(sum(counts))
    rows = lay_out(Step(0, 0, ints(slots), ints(starts), ints(counts), ints(samples), ints(tokens)), page_table)

    positions, pages, sampled, feeds = [], [], [], []
    for slot, start, count, num_samples in items:
        for position in range(start, start + count):
            positions.append(position)
            pages.append(page_table[slot, position // PAGE] * PAGE + position % PAGE)
        sampled += range(len(positions) - num_samples, len(positions))
        feeds += [num_samples == 1] * num_samples
    assert rows.tokens.tolist() == tokens.tolist()
    assert rows.positions.tolist() == positions
    assert rows.pages.tolist() == pages
    assert rows.sampled.tolist() == sampled
    assert rows.feeds.tolist() == feeds
    assert rows.ends.tolist() == [start + count for start, count in zip(starts, counts, strict=True)]
