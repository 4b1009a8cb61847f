"""Layouts and seams: the collective follows from (have, want); a schedule of collectives is an expected value."""

from __future__ import annotations

import pytest
import torch

from trireme.core.refusal import Refusal
from trireme.parallel.layout import ROWS, SUM, WHOLE, Layout, Move, lay, moves
from trireme.parallel.plan import Plan
from trireme.parallel.seam import Seam
from trireme_kernels.choose import Choices

TWO = {"tp": 2, "cp": 1}


@pytest.mark.parametrize(
    ("have", "want", "collective"),
    [(SUM, WHOLE, "all_reduce"), (SUM, ROWS, "reduce_scatter"), (ROWS, WHOLE, "all_gather"), (WHOLE, ROWS, "slice")],
)
def test_the_table(have, want, collective):
    assert moves(lay(tp=have), lay(tp=want), TWO) == (Move(collective, "tp"),)
    assert moves(lay(tp=have), lay(tp=want), {"tp": 1, "cp": 1}) == ()


@pytest.mark.parametrize("same", [WHOLE, ROWS])
def test_nothing_moves_where_nothing_changes(same):
    assert moves(lay(tp=same), lay(tp=same), TWO) == ()


@pytest.mark.parametrize(("have", "want"), [(WHOLE, SUM), (ROWS, SUM), (SUM, SUM)])
@pytest.mark.parametrize("sizes", [TWO, {"tp": 1, "cp": 1}])
def test_other_pairs_are_refused_on_any_mesh(have, want, sizes):
    with pytest.raises(Refusal, match=f"{have.name} -> {want.name} is not in the table"):
        moves(lay(tp=have), lay(tp=want), sizes)


def test_axes_move_one_after_the_other():
    assert moves(lay(tp=SUM, cp=ROWS), lay(), {"tp": 2, "cp": 2}) == (Move("all_reduce", "tp"), Move("all_gather", "cp"))


def test_a_layout_prints_what_is_cut():
    assert str(lay(tp=SUM)) == "lay(tp=SUM)" and str(lay()) == "lay()"


def seam(plan: Plan, have: Layout, want: Layout, **more) -> Seam:
    choices = Choices("cpu", torch.float32)
    return Seam(
        have,
        want,
        plan,
        weight=torch.linspace(0.5, 1.5, 8),
        eps=1e-6,
        rms_norm=choices("rms_norm", hidden=8),
        add_rms_norm=choices("add_rms_norm", hidden=8),
        **more,
    )


@pytest.mark.parametrize(
    ("plan", "schedule"),
    [
        (Plan(layer_cut=(1,)), []),
        (Plan(layer_cut=(1,), tp=2), ["all_reduce"]),
        (Plan(layer_cut=(1,), tp=2, sp=True), ["reduce_scatter", "all_gather"]),
    ],
)
def test_sequence_parallelism_is_where_the_residual_lives(plan: Plan, schedule: list[str]):
    seen = []

    def record(move: Move, x: torch.Tensor) -> torch.Tensor:
        seen.append(move.collective)
        return x

    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    seam(plan, lay(tp=SUM), lay(), collective=record)(x, residual)
    assert seen == schedule


def test_a_seam_adds_and_norms_the_sum():
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    normed, after = seam(Plan(layer_cut=(1,)), lay(tp=SUM), lay())(x, residual)
    torch.testing.assert_close(after, x + residual)
    again, same = seam(Plan(layer_cut=(1,)), lay(), lay())(None, after)
    assert torch.equal(again, normed) and same is after


def test_a_seam_that_cannot_be_is_refused_at_build():
    with pytest.raises(Refusal, match="no collective leads from"):
        seam(Plan(layer_cut=(1,)), lay(), lay(tp=SUM))
