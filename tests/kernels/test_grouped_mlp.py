"""grouped_mlp against an MLP for each pair alone; on a GPU, that nothing waits to know where pairs are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme_kernels.case import Case
from trireme_kernels.choose import Choices, build, misfit
from trireme_kernels.sort_by_slot.op import Pairs


def draw(counts, spare, top_k, hidden, width, seed=0):
    """(x, gate_up, down, pairs, expected): so many pairs of each slot, dealt to rows at random, and `spare` ones that are elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = -(-(sum(counts) + spare) // top_k)
    x = torch.randn(num_rows, hidden, generator=generator)
    gate_up = torch.randn(len(counts), 2 * width, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(len(counts), hidden, width, generator=generator) * width**-0.5
    order = torch.randperm(num_rows * top_k, generator=generator)
    begins = torch.tensor([0, *counts]).cumsum(0)
    expected = torch.full((num_rows * top_k, hidden), torch.nan)
    for slot, pairs in enumerate(order[: begins[-1]].split(counts)):
        for pair in pairs.tolist():
            gate, up = (gate_up[slot] @ x[pair // top_k]).chunk(2)
            expected[pair] = down[slot] @ (F.silu(gate) * up)
    order[begins[-1] :] = -1  # undefined, and not looked at
    return x, gate_up, down, Pairs(order.int(), begins.int(), torch.empty(num_rows, top_k)), expected


def check(found, expected):
    here = ~expected.isnan()
    torch.testing.assert_close(found.cpu()[here], expected[here], atol=2e-5, rtol=2e-5)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(0, 6), st.integers(0, 70)), min_size=1, max_size=9),
    spare=st.sampled_from([0, 0, 1, 40]),
    top_k=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 99),
)
def test_any_counts(counts, spare, top_k, sizes, seed):
    hidden, width = sizes
    *given, expected = draw(counts, spare, top_k, hidden, width, seed)
    check(Choices("cpu", torch.float32)("grouped_mlp")(*given), expected)


@pytest.mark.parametrize(
    ("counts", "spare", "top_k"),
    [
        ([0, 0, 0], 5, 1),
        ([1], 0, 1),
        ([16, 0, 16, 16], 0, 2),
        ([17, 1, 0, 0, 0, 0, 0, 33], 3, 3),
        ([0, 0, 600], 0, 2),
        ([1] * 11, 1, 4),
        ([2, 0, 0, 2090], 2100, 8),
    ],
    ids=["none", "one", "full tiles", "begun tiles", "one slot", "one row each", "over a hundred tiles"],
)
def test_kernel_finds_every_pair(counts, spare, top_k):
    """Where tiles begin and end, which depends on counts alone; the weights are small."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, gate_up, down, pairs, expected = draw(counts, spare, top_k, 5, 3)
    op = build("grouped_mlp", "tl", Case(device, torch.float32))
    check(op(x.to(device), gate_up.to(device), down.to(device), Pairs(*(each.to(device) for each in pairs))), expected)


def test_small_shared_memory_is_a_reason(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(shared_memory_per_block_optin=101376))
    reason = misfit("grouped_mlp", "tl", Case("cuda", torch.bfloat16))
    assert reason is not None and reason.startswith("a block of this GPU has 101376 bytes of shared memory, tiles need ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graph_serves_any_counts():
    """A captured MLP follows counts that change afterwards: no number of them was read on the CPU."""
    op = build("grouped_mlp", "tl", Case("cuda", torch.float32))
    x, gate_up, down, pairs, expected = draw([5, 0, 30, 5], 10, 2, 64, 32)
    weights, pairs = (gate_up.cuda(), down.cuda()), Pairs(*(each.cuda() for each in pairs))
    held, rows = Pairs(*(torch.zeros_like(each) for each in pairs)), torch.zeros(x.shape, device="cuda")
    op(rows, *weights, held)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = op(rows, *weights, held)
    for ours, theirs in zip((*held, rows), (*pairs, x), strict=True):
        ours.copy_(theirs)
    graph.replay()
    check(found, expected)
