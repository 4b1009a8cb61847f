"""Cuts: every rank's share is there once, heads stay whole, and what cannot be dealt out is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trireme.core.refusal import Refusal
from trireme.layers.block import Build
from trireme.layers.param import Cut, Param, Part, by_columns, by_heads, by_rows, vocabulary
from trireme.models.spec import Spec
from trireme.parallel.plan import Plan
from trireme_kernels.choose import Choices


def build(spec: Spec | None = None, tp: int = 1, rank: int = 0) -> Build:
    device, dtype = torch.device("cpu"), torch.float32
    return Build(spec, Plan(layer_cut=(1,), tp=tp), 0, device, dtype, Choices(device, dtype), rank=rank)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 6))
def test_shares_of_whole_units_tile_the_part(units_each: int, unit: int, size: int):
    part = Part(units_each * size, unit)
    rows = [row for rank in range(size) for row in part.share(rank, size)]
    assert rows == list(range(part.whole))


@given(st.integers(1, 300), st.integers(1, 8))
def test_a_ragged_vocabulary_tiles_too(vocab_size: int, size: int):
    part = vocabulary("tp", vocab_size).parts[0]
    assert [row for rank in range(size) for row in part.share(rank, size)] == list(range(vocab_size))


def test_key_value_heads_are_copied_where_ranks_outnumber_them():
    kv = by_heads("tp", 8, 2, 4).parts[1]
    assert [kv.share(rank, 4) for rank in range(4)] == [range(4), range(4), range(4, 8), range(4, 8)]


@pytest.mark.parametrize("size", [2, 4])
def test_heads_that_do_not_divide_are_refused(size: int):
    with pytest.raises(Refusal, match=f"tp={size} does not divide 3 units"):
        by_heads("tp", 9, 3, 4).parts[1].share(0, size)


def test_the_pieces_of_a_joined_param():
    """Rank 1 of 2 of six query heads and two key/value heads of two rows each."""
    param = Param(build(tp=2, rank=1), (20, 5), by_heads("tp", 6, 2, 2))
    assert param.shape == (10, 5) and param.whole == (20, 5)
    assert [param.part_shape(part) for part in range(3)] == [(12, 5), (4, 5), (4, 5)]
    q, k, v = (param.piece(part) for part in range(3))
    assert (q.source, q.target) == (range(6, 12), range(6))
    assert (k.source, k.target) == (range(2, 4), range(6, 8))
    assert (v.source, v.target) == (range(2, 4), range(8, 10))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ranks_together_hold_the_whole_weight(tp: int):
    whole = torch.randn(8, 12)
    for cut in (by_columns("tp", 8), by_rows("tp", 4, 3)):
        shares = []
        for rank in range(tp):
            piece = Param(build(tp=tp, rank=rank), (8, 12), cut).piece(0)
            shares.append(whole.narrow(piece.dim, piece.source.start, len(piece.source)))
        assert torch.equal(torch.cat(shares, dim=cut.dim), whole)


def test_an_uncut_param_is_one_part():
    param = Param(build(), (7,))
    assert param.cut == Cut((Part(7),)) and param.part_shape(0) == (7,) and not param.requires_grad
