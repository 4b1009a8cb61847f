"""Seams: whatever the home of the residual, ranks together have what one rank has; and the sum that is normed is the rounded one."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from threads import Boards, on_every_rank
from trireme.core.step import Regime
from trireme.parallel.aside import Done
from trireme.parallel.collectives import Collectives
from trireme.parallel.deal import Deal
from trireme.parallel.layout import SUM, Layout, cut_of, home_of, lay
from trireme.parallel.mesh import Mesh
from trireme.parallel.plan import Plan
from trireme.parallel.seam import Addend, Seam
from trireme_kernels.choose import Choices

HIDDEN, COUNTS = 8, [6, 5]


def make(collectives: Collectives, have: Layout, regime: Regime, want: Layout, dtype: torch.dtype = torch.float32) -> Seam:
    choices, home = Choices("cpu", dtype), home_of(regime)
    return Seam(
        have.at(home),
        home,
        want.at(home),
        collectives,
        weight=torch.linspace(0.5, 1.5, HIDDEN).to(dtype),
        eps=1e-6,
        rms_norm=choices("rms_norm", hidden=HIDDEN),
        add_rms_norm=choices("add_rms_norm", hidden=HIDDEN),
    )


def cross(seam: Seam, x: torch.Tensor | None, residual: torch.Tensor, deal: Deal) -> tuple[torch.Tensor, torch.Tensor]:
    normed, [summed] = seam(None if x is None else [x], [residual], deal)
    return normed.whole(), summed


def whole(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    plan = Plan(layer_cut=(1,))
    seam = make(Collectives(Mesh(plan), 0), lay(tp=SUM), Regime(), lay())
    return cross(seam, x, residual, Deal(plan, 0, np.array(COUNTS)))


@pytest.mark.parametrize(("strip_rows", "num_strips"), [(0, 1), (11, 1), (10, 2), (1, 2)])
@pytest.mark.parametrize("regime", [Regime(), Regime(sp=True), Regime(cp=True), Regime(sp=True, cp=True)])
def test_ranks_together_have_what_one_has(regime, strip_rows, num_strips):
    plan = Plan(layer_cut=(1,), tp=2, cp=2, sp=True, strip_rows=strip_rows)
    mesh, boards = Mesh(plan), Boards()
    shares = torch.randn(plan.tp, sum(COUNTS), HIDDEN)
    residual = torch.randn(sum(COUNTS), HIDDEN)
    normed, summed = whole(shares.sum(0), residual)

    def run(rank: int):
        collectives, deal = Collectives(mesh, rank), Deal(plan, rank, np.array(COUNTS), regime)
        seam = make(collectives, lay(tp=SUM), regime, lay())
        collectives.begin(boards.groups(collectives))
        own, home = torch.from_numpy(deal.own()), torch.from_numpy(deal.rows(cut_of(home_of(regime), mesh)))
        sizes, here = deal.sizes(()) if not regime.cp else [len(own)], residual[home].split(deal.sizes(cut_of(home_of(regime), mesh)))
        assert len(sizes) == (num_strips if regime == Regime(sp=True) else 1)
        found, strips = seam(shares[rank % plan.tp][own].split(sizes), here, deal)
        assert found.sizes == sizes
        torch.testing.assert_close(found.whole(), normed[own])
        torch.testing.assert_close(torch.cat(strips), summed[home])
        return len(home)

    rows = on_every_rank(plan.ranks, run, boards)
    copies = (1 if regime.sp else plan.tp) * (1 if regime.cp else plan.cp)
    assert sum(rows) == copies * sum(COUNTS)


def test_products_of_strips_are_computed_beside_what_is_aside(monkeypatch):
    """What ranks exchange of one strip goes beside the product of the next: only then do strips pay."""
    plan = Plan(layer_cut=(1,), tp=2, sp=True, strip_rows=10)
    mesh, boards, regime, products, aside = Mesh(plan), Boards(), Regime(sp=True), [], [False, False]
    rows, columns, residual = torch.randn(plan.tp, 11, 4), torch.randn(4, HIDDEN), torch.randn(11, HIDDEN)
    normed, summed = whole((rows @ columns).sum(0), residual)

    def run(rank: int):
        @contextmanager
        def beside():
            aside[rank] = True
            yield Done()
            aside[rank] = False

        class Product(Addend):
            def alone(self) -> torch.Tensor:
                products.append(aside[rank])
                return super().alone()

        collectives, deal = Collectives(mesh, rank), Deal(plan, rank, np.array(COUNTS), regime)
        monkeypatch.setitem(vars(collectives), "aside", beside)
        seam = make(collectives, lay(tp=SUM), regime, lay())
        collectives.begin(boards.groups(collectives))
        home = torch.from_numpy(deal.rows(cut_of(home_of(regime), mesh)))
        given = [Product(strip, columns) for strip in rows[rank].split(deal.sizes(()))]
        found, strips = seam(given, residual[home].split(deal.sizes(cut_of(home_of(regime), mesh))), deal)
        torch.testing.assert_close(found.whole(), normed)
        torch.testing.assert_close(torch.cat(strips), summed[home])

    on_every_rank(plan.ranks, run, boards)
    assert products == [False] * 4


def test_the_first_seam_of_a_stage_norms_what_came():
    plan, residual = Plan(layer_cut=(1,)), torch.randn(sum(COUNTS), HIDDEN)
    seam = make(Collectives(Mesh(plan), 0), lay(), Regime(), lay())
    normed, same = cross(seam, None, residual, Deal(plan, 0, np.array(COUNTS)))
    assert same is residual
    torch.testing.assert_close(normed, whole(torch.zeros_like(residual), residual)[0])


def test_the_norm_reads_the_rounded_sum():
    """A stage that receives the sum in bfloat16 norms the same numbers as one that made it."""
    plan = Plan(layer_cut=(1,))
    seam = make(Collectives(Mesh(plan), 0), lay(tp=SUM), Regime(), lay(), torch.bfloat16)
    x, residual = (torch.randn(sum(COUNTS), HIDDEN).to(torch.bfloat16) for _ in range(2))
    deal = Deal(plan, 0, np.array(COUNTS))
    normed, summed = cross(seam, x, residual, deal)
    assert torch.equal(cross(seam, None, summed, deal)[0], normed)
