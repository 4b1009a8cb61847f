"""Cuts: every rank's share is there once, heads stay whole, and what cannot be dealt out is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trireme.core.refusal import Refusal
from trireme.layers.block import Build
from trireme.layers.param import Param, Part, by_columns, by_groups, by_heads, by_rows, by_slots, vocabulary
from trireme.parallel.placement import Placement
from trireme.parallel.plan import Plan
from trireme_kernels.choose import Choices


def build(spec: Any = None, rank: int = 0, **sizes: Any) -> Build:
    device, dtype = torch.device("cpu"), torch.float32
    return Build(spec, Plan(layer_cut=(1,), **sizes), 0, device, dtype, Choices(device, dtype), rank=rank)


def run(*bounds: int) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in zip(bounds[::2], bounds[1::2], strict=True))


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
    assert [param.tensor_shape((part,)) for part in range(3)] == [(12, 5), (4, 5), (4, 5)]
    [q], [k], [v] = (param.pieces((part,)) for part in range(3))
    assert q == (run(6, 12, 0, 5), run(0, 6, 0, 5))
    assert k == (run(2, 4, 0, 5), run(6, 8, 0, 5))
    assert v == (run(2, 4, 0, 5), run(8, 10, 0, 5))


def test_the_pieces_of_an_interleaved_tensor():
    """Rank 1 of 2 of four groups, each with two rows of the first part and three of the second: a a b b b a a b b b ..."""
    param = Param(build(tp=2, rank=1), (20, 5), by_groups("tp", 4, 2, 3))
    assert param.tensor_shape((0, 1)) == (20, 5) and param.shape == (10, 5)
    assert param.pieces((0, 1), interleaved=True) == [
        (run(10, 12, 0, 5), run(0, 2, 0, 5)),
        (run(15, 17, 0, 5), run(2, 4, 0, 5)),
        (run(12, 15, 0, 5), run(4, 7, 0, 5)),
        (run(17, 20, 0, 5), run(7, 10, 0, 5)),
    ]


def test_what_is_added_when_a_param_is_filled():
    param = Param(build(), (3,), dtype=torch.float64, plus=1.0)
    [piece] = param.pieces((0,))
    assert param.fill(piece, torch.tensor([0.5, 0.0, -1.0])) == 24
    assert param.tolist() == [1.5, 1.0, 0.0]


def test_the_pieces_of_stacked_experts():
    """The last of four ranks, two along ep and two along moe_tp, of six experts of four gates and four ups."""
    param = Param(build(tp=4, ep=2, rank=3), (6, 8, 5), by_slots("ep", Placement(6, 2, 1)), by_columns("moe_tp", 4, 4, dim=1))
    assert param.shape == (3, 4, 5) and param.experts == [3, 4, 5]
    assert param.cells() == [(part, expert) for expert in (3, 4, 5) for part in (0, 1)]
    assert param.tensor_shape((1,), 4) == (4, 5) and param.tensor_shape((0, 1)) == (6, 8, 5)
    assert param.pieces((1,), 4) == [(run(2, 4, 0, 5), run(1, 2, 2, 4, 0, 5))]
    gate, up = param.pieces((0, 1))  # of one tensor that holds both
    assert gate == (run(3, 6, 2, 4, 0, 5), run(0, 3, 0, 2, 0, 5))
    assert up == (run(3, 6, 6, 8, 0, 5), run(0, 3, 2, 4, 0, 5))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ranks_together_hold_the_whole_weight(tp: int):
    whole = torch.randn(8, 12)
    for cut in (by_columns("tp", 8), by_rows("tp", 4, 3)):
        shares = []
        for rank in range(tp):
            [piece] = Param(build(tp=tp, rank=rank), (8, 12), cut).pieces((0,))
            shares.append(whole[piece.source])
        assert torch.equal(torch.cat(shares, dim=cut.dim), whole)


@pytest.mark.parametrize("sizes", [{"tp": 4}, {"tp": 2, "ep": 2}, {"tp": 4, "ep": 2}, {"tp": 2, "cp": 2, "ep": 2, "moe_dp": 2}], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_ranks_together_hold_every_expert(sizes: dict, fused: bool):
    """As often as there are copies of the experts, from either form of checkpoint."""
    whole = torch.arange(4.0 * 16 * 3).view(4, 16, 3)
    times = torch.zeros_like(whole)
    for rank in range(sizes["tp"] * sizes.get("cp", 1)):
        made = build(rank=rank, **sizes)
        place, num_ranks = made.place("ep")
        param = Param(made, (4, 16, 3), by_slots("ep", Placement(4, num_ranks, place)), by_columns("moe_tp", 8, 8, dim=1))
        assert param.experts is not None
        tensors = [((0, 1), None, whole, times)] if fused else []
        for expert in () if fused else param.experts:
            tensors += [((part,), expert, *(of[expert].split(8)[part] for of in (whole, times))) for part in (0, 1)]
        for parts, expert, tensor, counted in tensors:
            for piece in param.pieces(parts, expert):
                param.data[piece.target].copy_(tensor[piece.source])
                counted[piece.source] += 1
        held = torch.isin(param.data, whole[param.experts])
        assert held.all() and param.data.unique().numel() == param.numel()
    assert bool((times == sizes.get("moe_dp", 1)).all())


def test_an_uncut_param_is_one_part():
    param = Param(build(), (7,))
    assert param.cells() == [(0, None)] and param.tensor_shape((0,)) == (7,) and not param.requires_grad
