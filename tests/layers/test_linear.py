"""Linear before and after its weight is packed, for every count of rows near the limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from layers.test_param import build
from trireme.layers.linear import Linear


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


def test_a_tied_weight_stays_with_its_owner():
    owner = Linear(build(), 6, 4)
    owner.weight.data.normal_()
    tied = Linear(build(), 6, 4, tied=owner.weight)
    tied.prepare()
    assert owner.weight is not None
    x = torch.randn(5, 4)
    torch.testing.assert_close(tied(x), owner(x))
