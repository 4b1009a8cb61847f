"""ToldRows: the newest rows that fit, in order; nothing is left once they are taken."""

from __future__ import annotations

import numpy as np
import pytest

from trireme.core.told import ToldRows

WIDTH = 5
ROW_BYTES = 4 * 4 + 2 * WIDTH


def some(first: int, count: int) -> tuple[bytes, bytes]:
    numbers = np.arange(first, first + count)
    return np.repeat(numbers.astype(np.int32), 4).tobytes(), np.repeat(numbers.astype(np.int16), WIDTH).tobytes()


@pytest.mark.parametrize("most", [1, 7, 10, 11, 99, 100, 1000])
def test_the_newest_stay(most):
    told, first = ToldRows(most * ROW_BYTES), 0
    for count in (10, 0, 1, 39, 50):
        told.add(*some(first, count))
        first += count
        rows, experts = told.arrays()
        kept = min(first, most)
        assert told.num_rows == kept and told.left_out == first - kept
        assert rows[:, 0].tolist() == experts[:, 0].tolist() == list(range(first - kept, first))
    rows, experts, left_out = told.take()
    assert len(rows) == 16 * min(100, most) and len(experts) == 2 * WIDTH * min(100, most) and left_out == max(0, 100 - most)
    assert told.take() == (b"", b"", 0)
    other = ToldRows(1 << 20)
    other.add(rows, experts, left_out)
    assert other.take() == (rows, experts, left_out)
