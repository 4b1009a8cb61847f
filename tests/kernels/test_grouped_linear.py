"""grouped_linear against a product for each row alone; on a GPU, that nothing waits for the counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme_kernels.case import Case
from trireme_kernels.choose import Choices, build, misfit


def draw(counts, spare, num_in, num_out, seed=0):
    """(x, weight, counts, expected): rows of no slot are nan, and expected to be 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts) + spare, num_in, generator=generator)
    weight = torch.randn(len(counts), num_out, num_in, generator=generator)
    slots = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    expected = torch.zeros(len(x), num_out)
    for row, slot in enumerate(slots):
        expected[row] = weight[slot] @ x[row]
    x[len(slots) :] = torch.nan
    return x, weight, torch.tensor(counts), expected


def run(op, x, weight, counts):
    return op.run(x, weight, op.plan(counts, len(x)))


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(0, 6), st.integers(0, 70)), min_size=1, max_size=9),
    spare=st.sampled_from([0, 0, 1, 40]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 99),
)
def test_any_counts(counts, spare, sizes, seed):
    *given, expected = draw(counts, spare, *sizes, seed)
    torch.testing.assert_close(run(Choices("cpu", torch.float32)("grouped_linear"), *given), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("counts", "spare"),
    [
        ([0, 0, 0], 5),
        ([1], 0),
        ([16, 0, 16, 16], 0),
        ([17, 1, 0, 0, 0, 0, 0, 33], 3),
        ([0, 0, 600], 0),
        ([1] * 11, 1),
        ([2, 0, 0, 2090], 2100),
    ],
    ids=["none", "one", "full tiles", "begun tiles", "one slot", "one row each", "over a hundred tiles"],
)
def test_kernel_finds_every_row(counts, spare):
    """Where tiles begin and end, which depends on counts alone; the weights are small."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    *given, expected = draw(counts, spare, 5, 3)
    found = run(build("grouped_linear", "tl", Case(device, torch.float32)), *(tensor.to(device) for tensor in given))
    torch.testing.assert_close(found.cpu(), expected, atol=2e-5, rtol=2e-5)


def test_one_plan_serves_weights_of_any_shape():
    op = Choices("cpu", torch.float32)("grouped_linear")
    x, up, counts, hidden = draw([2, 0, 3], 1, 8, 12)
    down = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1))
    plan = op.plan(counts, len(x))
    found = op.run(op.run(x, up, plan), down, plan)
    torch.testing.assert_close(found, run(op, hidden, down, counts), atol=2e-5, rtol=2e-5)


def test_small_shared_memory_is_a_reason(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(shared_memory_per_block_optin=101376))
    reason = misfit("grouped_linear", "tl", Case("cuda", torch.bfloat16))
    assert reason == "a block of this GPU has 101376 bytes of shared memory, tiles need 147456"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graph_serves_any_counts():
    """A captured plan and product follow counts that change afterwards: no number of them was read on the CPU."""
    op = build("grouped_linear", "tl", Case("cuda", torch.float32))
    x, weight, counts, expected = (tensor.cuda() for tensor in draw([5, 0, 30, 5], 10, 64, 64))
    held, rows = torch.zeros_like(counts), torch.zeros_like(x)
    run(op, rows, weight, held)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(op, rows, weight, held)
    held.copy_(counts)
    rows.copy_(x)
    graph.replay()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
