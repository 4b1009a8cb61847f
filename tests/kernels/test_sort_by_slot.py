"""sort_by_slot: every pair of a slot that is here, once, in order; nothing of other pairs. On a GPU, captured ones follow what changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme_kernels.case import Case
from trireme_kernels.choose import build, misfit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made(name: str):
    case = Case(DEVICE, torch.float32)
    if (reason := misfit("sort_by_slot", name, case, forced=True)) is not None:
        pytest.skip(reason)
    return build("sort_by_slot", name, case)


@pytest.mark.parametrize("name", ["reference", "tl"])
def test_three_rows_of_two_experts(name: str):
    """Slots 2 and 3 of four are here; the last row is nobody's."""
    slots = torch.tensor([[3, 0], [2, 3], [2, 3]], device=DEVICE)
    weights = torch.tensor([[0.5, 0.25], [0.75, 0.125], [1.0, 1.0]], device=DEVICE)
    order, begins, here = made(name)(slots, weights, 2, 2, torch.tensor([2], device=DEVICE))
    assert begins.tolist() == [0, 1, 3] and order[:3].tolist() == [2, 0, 3]
    assert here.tolist() == [[0.5, 0.0], [0.75, 0.125], [0.0, 0.0]]


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 40), top_k=st.integers(1, 4), first=st.integers(0, 6), here=st.integers(1, 6), seed=st.integers(0, 99))
@pytest.mark.parametrize("name", ["reference", "tl"])
def test_any_slots(name: str, rows: int, top_k: int, first: int, here: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    slots = torch.randint(12, (rows, top_k), generator=draw)
    weights = torch.rand(rows, top_k, generator=draw) + 0.1
    order, begins, kept = (each.cpu() for each in made(name)(slots.to(DEVICE), weights.to(DEVICE), first, here, None))
    numbered = list(enumerate(slots.flatten().tolist()))
    wanted = [[pair for pair, slot in numbered if slot == each] for each in range(first, first + here)]
    assert [order[begins[each] : begins[each + 1]].tolist() for each in range(here)] == wanted
    assert torch.equal(kept, weights * ((slots >= first) & (slots < first + here)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [8, 256, 8192])
def test_a_graph_follows_slots_and_rows(rows: int):
    """Also of more pairs than a program reads at once; equal every time."""
    sort, plain = made("tl"), build("sort_by_slot", "reference", Case("cuda", torch.float32))
    draw = torch.Generator("cuda").manual_seed(0)
    slots, weights = torch.zeros(rows, 8, dtype=torch.int64, device="cuda"), torch.rand(rows, 8, generator=draw, device="cuda")
    real = torch.tensor([rows], device="cuda")
    sort(slots, weights, 16, 64, real)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sort(slots, weights, 16, 64, real)
    for num_rows in (rows, rows // 2, 0):
        slots.copy_(torch.randint(128, slots.shape, generator=draw, device="cuda"))
        real.fill_(num_rows)
        graph.replay()
        wanted = plain(slots, weights, 16, 64, real)
        end = int(wanted.begins[-1])
        assert torch.equal(found.begins, wanted.begins) and torch.equal(found.order[:end], wanted.order[:end])
        assert torch.equal(found.weights, wanted.weights)
