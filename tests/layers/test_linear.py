"""Linear before and after its weight is packed, for every count of rows near the limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from layers.test_param import build
from trireme.layers import linear as linears
from trireme.layers.linear import GatedLinear, LastLinear, Linear
from trireme.layers.param import by_rows
from trireme.parallel.seam import Addend


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 5, 33])
def test_packing_changes_nothing(num_rows: int, bias: bool):
    linear = Linear(build(), 37, 19, bias=bias)
    for param in linear.parameters():
        param.data.normal_()
    x = torch.randn(num_rows, 19)
    weight = linear.weight.data.clone()
    wanted = F.linear(x, weight, linear.bias)
    assert torch.equal(linear(x), wanted)
    linear.prepare()
    assert not hasattr(linear, "weight")
    torch.testing.assert_close(linear(x), wanted, atol=1e-5, rtol=1e-5)
    assert linear(x).is_contiguous()


@pytest.mark.parametrize("packed", [False, True])
def test_one_of_the_ranks_that_owe_a_sum_adds_the_bias(packed: bool):
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(5, 8)
    owed = torch.zeros(5, 6)
    for rank in range(2):
        linear = Linear(build(tp=2, rank=rank), 6, 8, by_rows("tp", 4, 2), bias=True)
        [piece] = linear.weight.pieces((0,))
        linear.weight.data.copy_(weight[piece.source])
        assert linear.bias is not None
        linear.bias.data.copy_(bias)
        if packed:
            linear.prepare()
        owed += linear(x[:, piece.source[1]])
    torch.testing.assert_close(owed, F.linear(x, weight, bias))


def test_a_tied_weight_stays_with_its_owner():
    owner = Linear(build(), 6, 4)
    owner.weight.data.normal_()
    tied = Linear(build(), 6, 4, tied=owner.weight)
    tied.prepare()
    assert owner.weight is not None
    x = torch.randn(5, 4)
    torch.testing.assert_close(tied(x), owner(x))


def test_all_ways_to_multiply_are_tried(monkeypatch):
    """At load, of every form: else a kernel is loaded, or compiled, in a request. What adds to the residual is another kernel."""
    kinds = Linear(build(), 6, 4), GatedLinear(build(), 3, 4, None), LastLinear(build(), 6, 4)
    assert len({linear.form for linear in kinds}) == len(kinds) and all(linear.weight.shape == (6, 4) for linear in kinds)
    added = []
    monkeypatch.setattr(linears, "_MANY", 5)
    monkeypatch.setattr(Addend, "added_to", lambda self, residual: added.append((self.rows.shape, self.columns.shape, residual.shape)))
    for linear in kinds:
        for num_rows in (4, 5):
            linear.multiply_any(num_rows)
    assert added == [((5, 4), (4, 6), (5, 6))]
