"""Strategies: wherever experts are, rows get the weighted sum of theirs, and no rank computes a row twice."""

from __future__ import annotations

import pytest
import torch

from threads import Boards, on_every_rank
from trireme.parallel.collectives import Collectives
from trireme.parallel.experts import Mlp, Ops, make_strategy
from trireme.parallel.mesh import Mesh
from trireme.parallel.plan import Plan
from trireme_kernels.choose import Choices
from trireme_kernels.sort_by_slot.op import Pairs

EXPERTS, TOP_K, HIDDEN = 8, 3, 5
MATRICES = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))


def routed(num_rows: int, seed: int, lean: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, experts and weights. Where rows `lean`, experts 0 and 1 are nearly everyone's choice, and some have no rows."""
    draw = torch.Generator().manual_seed(seed)
    liking = torch.rand(num_rows, EXPERTS, generator=draw) + lean * (torch.arange(EXPERTS) < 2)
    return torch.randn(num_rows, HIDDEN, generator=draw), liking.topk(TOP_K).indices, torch.rand(num_rows, TOP_K, generator=draw)


def dense(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.einsum("th,tkhj,tk->tj", x, MATRICES[experts], weights)


def computer(rank: int, num_slots: int, computed: list[int]) -> Mlp:
    """A rank's experts; it notes how many pairs it computed. Of other pairs its results are nan."""

    def mlp(rows: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        counts = pairs.begins.diff().long()
        order = pairs.order[: int(counts.sum())].long()
        assert len(counts) == num_slots
        computed[rank] = len(order)
        own = MATRICES[rank * num_slots : (rank + 1) * num_slots].repeat_interleave(counts, dim=0)
        given = rows[order // pairs.weights.shape[1]]
        results = torch.full((len(pairs.order), HIDDEN), torch.nan)
        return results.index_copy_(0, order, torch.einsum("mh,mhj->mj", given, own))

    return mlp


def strategies(kind: str, ep: int, boards: Boards) -> list:
    plan, made, choices = Plan(layer_cut=(1,), tp=ep, ep=ep), [], Choices("cpu", torch.float32)
    ops = Ops(choices("sort_by_slot"), choices("combine_experts"))
    for rank in range(ep):
        collectives = Collectives(Mesh(plan), rank)
        made.append(make_strategy(kind, EXPERTS // ep, collectives, ops))
        collectives.begin(boards.groups(collectives))
    return made


@pytest.mark.parametrize("ep", [1, 2, 4, 8])
@pytest.mark.parametrize(("num_rows", "lean"), [(0, 0.0), (1, 0.0), (13, 0.0), (13, 1.0)])
def test_gathered_ranks_owe_the_whole(ep: int, num_rows: int, lean: float):
    given, computed = routed(num_rows, ep, lean), [0] * ep
    made = strategies("gathered", ep, Boards())
    shares = [made[rank](*given, computer(rank, EXPERTS // ep, computed), None, None) for rank in range(ep)]
    torch.testing.assert_close(sum(shares), dense(*given))
    assert sum(computed) == num_rows * TOP_K


@pytest.mark.parametrize(
    ("rows", "lean"),
    [([4], 0.0), ([3, 3], 0.0), ([7, 2], 1.0), ([0, 5], 0.0), ([0, 0], 0.0), ([1, 0, 6, 2], 1.0), ([2, 3, 1, 0, 4, 1, 0, 1], 0.0)],
    ids=str,
)
def test_dispatched_rows_come_home(rows: list[int], lean: float):
    ep, boards, computed = len(rows), Boards(), [0] * len(rows)
    made = strategies("dispatched", ep, boards)

    def run(rank: int) -> None:
        given = routed(rows[rank], rank, lean)
        torch.testing.assert_close(made[rank](*given, computer(rank, EXPERTS // ep, computed), None, None), dense(*given))

    on_every_rank(ep, run, boards)
    assert sum(computed) == sum(rows) * TOP_K


def test_a_row_does_not_see_where_its_experts_are():
    """Bit for bit: the order of a sum is the order of a row's experts."""
    given, every = routed(9, 3), []
    for ep in (1, 2, 4):
        boards, computed = Boards(), [0] * ep
        made = strategies("dispatched", ep, boards)
        every += on_every_rank(ep, lambda rank: made[rank](*given, computer(rank, EXPERTS // ep, computed), None, None), boards)  # noqa: B023
    assert all(torch.equal(each, every[0]) for each in every)


def test_sums_are_made_in_float32():
    x, experts, weights = routed(6, 1)
    [gathered] = strategies("gathered", 1, Boards())
    rows = torch.randn(6 * TOP_K, HIDDEN).bfloat16()
    found = gathered(x.bfloat16(), experts, weights, lambda _, pairs: rows, None, None)
    each = rows.view(6, TOP_K, HIDDEN).float()
    assert found.dtype == torch.bfloat16 and torch.equal(found, (each * weights[..., None]).sum(1).bfloat16())


@pytest.mark.parametrize("kind", ["gathered", "dispatched"])
@pytest.mark.parametrize("real", [0, 2, 7])
def test_rows_of_nobody_are_not_computed(kind: str, real: int):
    given, computed = routed(7, 5), [0]
    [made] = strategies(kind, 1, Boards())
    found = made(*given, computer(0, EXPERTS, computed), None, torch.tensor([real]))
    torch.testing.assert_close(found, dense(*given) * (torch.arange(7) < real)[:, None])
    assert computed == [real * TOP_K]
