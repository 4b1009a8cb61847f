"""Layouts over both views of the mesh: whatever is moved arrives right, or the pair is refused when it is built."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threads import Boards, on_every_rank
from trireme.core.refusal import Refusal
from trireme.core.step import Regime
from trireme.parallel.collectives import Collectives
from trireme.parallel.deal import Deal
from trireme.parallel.layout import ROWS, SUM, WHOLE, Layout, cut_of, lay, lay_experts, moves
from trireme.parallel.mesh import Mesh
from trireme.parallel.plan import Plan
from trireme.parallel.seam import Route

KINDS = (WHOLE, ROWS, SUM)
MESHES = {
    "tp2 cp2": Plan(layer_cut=(1,), tp=2, cp=2),
    "tp2 cp2 ep2": Plan(layer_cut=(1,), tp=2, cp=2, ep=2),
    "tp2 cp2 moe_dp2 ep2": Plan(layer_cut=(1,), tp=2, cp=2, ep=2, moe_dp=2),
    "tp4 ep2": Plan(layer_cut=(1,), tp=4, ep=2),
    "cp4 ep2": Plan(layer_cut=(1,), cp=4, ep=2),
}


def layouts() -> list[Layout]:
    dense = [lay(tp=tp, cp=cp) for tp, cp in product(KINDS, KINDS)]
    experts = [lay_experts(ep=ep, moe_tp=moe_tp, moe_dp=moe_dp) for ep, moe_tp, moe_dp in product(KINDS, KINDS, KINDS)]
    return dense + experts


def rows_of(layout: Layout, deal: Deal, mesh: Mesh, truth: torch.Tensor) -> torch.Tensor:
    return truth[torch.from_numpy(deal.rows(cut_of(layout, mesh)))]


def debtors(layout: Layout, mesh: Mesh, rank: int) -> list[int]:
    """The ranks between which a sum is owed, this one among them."""
    others = [rank]
    for axis, rows in layout.axes:
        if rows is SUM:
            others = [member for other in others for member in mesh.spans[axis].members(other)]
    return others


def check(plan: Plan, have: Layout, want: Layout, counts: list[int], regime: Regime) -> bool:
    """Whether there is a way; if so it is walked on every rank, and what is owed and had after it is as wanted."""
    mesh = Mesh(plan)
    try:
        moves(have, want, mesh)
    except Refusal:
        return False
    truth = torch.arange(sum(counts) * 3, dtype=torch.float64).view(-1, 3) + 1
    boards = Boards()
    deals = [Deal(plan, rank, np.array(counts, np.int32), regime) for rank in range(plan.ranks)]

    def run(rank: int) -> torch.Tensor:
        collectives = Collectives(mesh, rank)
        route = Route(have, want, collectives)
        collectives.begin(boards.groups(collectives))
        owing = debtors(have, mesh, rank)
        share = (owing.index(rank) + 1) / sum(range(len(owing) + 1))  # unlike the others'
        return route(rows_of(have, deals[rank], mesh, truth) * share, deals[rank])

    found = on_every_rank(plan.ranks, run, boards)
    for rank, deal in enumerate(deals):
        total = sum(found[other] for other in debtors(want, mesh, rank))
        torch.testing.assert_close(total, rows_of(want, deal, mesh, truth), msg=f"{have} -> {want} on {plan}, {counts}, {regime}")
    return True


@pytest.mark.parametrize("name", MESHES)
def test_every_pair_is_moved_right_or_refused(name):
    """All pairs of both views on 2 x 2 meshes, with rows that no size divides, zig-zag and not."""
    plan, moved = MESHES[name], 0
    for have, want in product(layouts(), layouts()):
        moved += check(plan, have, want, [7, 4], Regime(cp=plan.cp > 1))
    assert moved > len(layouts())  # more than the identities


@given(
    st.sampled_from(list(MESHES.values())),
    st.sampled_from(layouts()),
    st.sampled_from(layouts()),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_rows_and_regime(plan, have, want, counts, zigzag):
    check(plan, have, want, counts, Regime(cp=zigzag and plan.cp > 1))


def path(plan: Plan, have: Layout, want: Layout) -> list[str]:
    mesh = Mesh(plan)
    return [f"{move.collective} {mesh.name_of(move.span)}" for move in moves(have.at(lay(cp=WHOLE)), want.at(lay(cp=WHOLE)), mesh)]


def test_both_debts_of_experts_are_paid_in_one_reduction():
    owed = lay_experts(ep=SUM, moe_tp=SUM, moe_dp=ROWS)
    assert path(Plan(layer_cut=(1,), tp=4, ep=2), owed, lay(cp=WHOLE)) == ["all_reduce tp"]
    assert path(Plan(layer_cut=(1,), tp=4, ep=2), owed, lay(tp=ROWS, cp=WHOLE)) == ["reduce_scatter tp"]
    plan = Plan(layer_cut=(1,), tp=2, cp=2, ep=2, moe_dp=2)
    assert path(plan, owed, lay(tp=ROWS, cp=ROWS)) == ["reduce_scatter tp"]
    plan = Plan(layer_cut=(1,), tp=2, cp=2, ep=2)
    assert path(plan, lay_experts(ep=SUM, moe_tp=SUM), lay(tp=ROWS, cp=ROWS)) == ["reduce_scatter stage"]


def test_sums_are_completed_on_the_fewest_rows():
    plan = Plan(layer_cut=(1,), tp=2, cp=2)
    assert path(plan, lay(tp=SUM, cp=ROWS), lay(cp=WHOLE)) == ["all_reduce tp", "all_gather cp"]
    assert path(plan, lay(tp=SUM, cp=SUM), lay(cp=ROWS)) == ["reduce_scatter cp", "all_reduce tp"]


def test_pairs_that_nothing_joins_are_refused_with_their_names():
    with pytest.raises(Refusal, match=r"no collective leads from lay\(\) to lay\(tp=SUM\) along tp"):
        path(Plan(layer_cut=(1,), tp=2), lay(cp=WHOLE), lay(tp=SUM, cp=WHOLE))
    with pytest.raises(Refusal, match="do not nest"):
        path(Plan(layer_cut=(1,), tp=2, cp=3, ep=2), lay(tp=ROWS, cp=WHOLE), lay_experts(ep=ROWS))


def test_one_rank_needs_no_move():
    assert not path(Plan(layer_cut=(1,)), lay(tp=SUM, cp=SUM), lay(tp=ROWS, cp=WHOLE))
