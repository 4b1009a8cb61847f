"""Layout: how a tensor's rows lie over a stage's ranks, and which collectives lead from one layout to another. Values only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Literal, NamedTuple

from trireme.core.refusal import Refusal
from trireme.core.step import Regime
from trireme.parallel.mesh import Mesh, Span


class Rows(Enum):
    """Along one axis of the mesh, a rank has ..."""

    WHOLE = "whole"  # every row
    ROWS = "rows"  # its cut of the rows
    SUM = "sum"  # every row, but only its share of a sum still owed
    HOME = "home"  # what the residual has; only where a block declares what it takes and gives


WHOLE, ROWS, SUM, HOME = Rows


@dataclass(frozen=True)
class Layout:
    """Rows along each axis of one view of the mesh, outermost first. An axis of one rank is WHOLE, ROWS and SUM at once."""

    axes: tuple[tuple[str, Rows], ...]

    def __str__(self) -> str:
        said = [f"{axis}={rows.name}" for axis, rows in reversed(self.axes) if rows is not WHOLE]
        return f"lay({', '.join(said)})"

    def at(self, home: Layout) -> Layout:
        """This layout in a stage where the residual is at `home`. moe_dp is cp or has one rank, so HOME means the same there."""
        homes = dict(home.axes)
        homes["moe_dp"] = homes["cp"]
        return Layout(tuple((axis, homes[axis] if rows is HOME else rows) for axis, rows in self.axes))


def lay(tp: Rows = WHOLE, cp: Rows = HOME) -> Layout:
    """By the dense view. lay(tp=SUM): a sum over tp is owed."""
    return Layout((("cp", cp), ("tp", tp)))


def lay_experts(ep: Rows = WHOLE, moe_tp: Rows = WHOLE, moe_dp: Rows = HOME) -> Layout:
    """By the experts' view."""
    return Layout((("moe_dp", moe_dp), ("ep", ep), ("moe_tp", moe_tp)))


def home_of(regime: Regime) -> Layout:
    """Where the residual lives. This line is sequence parallelism, and context parallelism between blocks."""
    return lay(tp=ROWS if regime.sp else WHOLE, cp=ROWS if regime.cp else WHOLE)


Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "slice"]
Cut = tuple[Span, ...]  # the spans by which rows are cut, innermost first

_TABLE: Mapping[tuple[Rows, Rows], Collective | None] = {
    (WHOLE, WHOLE): None,
    (ROWS, ROWS): None,
    (SUM, SUM): None,
    (SUM, WHOLE): "all_reduce",
    (SUM, ROWS): "reduce_scatter",
    (ROWS, WHOLE): "all_gather",
    (WHOLE, ROWS): "slice",
}


class Move(NamedTuple):
    """One collective over one span of ranks, and how rows are cut before it and after."""

    collective: Collective
    span: Span
    before: Cut
    after: Cut


class _Piece(NamedTuple):
    """Ranks along which neither layout changes."""

    span: Span
    have: Rows
    want: Rows


def moves(have: Layout, want: Layout, mesh: Mesh) -> tuple[Move, ...]:
    """The collectives from one layout to another, which may be of different views; no HOME is left in either.

    Rows are gathered from the inside out, and then dealt out from the outside in, since outer cuts are made first. A sum that
    stays where it is completed while rows are fewest: before they are gathered, or after they are dealt out. Neighbouring
    pieces under the same collective are one: where ep and moe_tp both owe, one reduction pays both. Refusal for a pair that no
    collective joins, or for two views that do not nest.
    """
    pieces = _pieces(have, want, mesh)
    for span, *pair in pieces:
        if tuple(pair) not in _TABLE:
            raise Refusal(
                f"no collective leads from {have} to {want} along {mesh.name_of(span)}",
                why=f"{pair[0].name} -> {pair[1].name} is not in the table",
                fix="let the block before give what the block after takes",
            )
    again = _dealt_again(pieces)
    reduced = [p.span for p in pieces if (p.have, p.want) == (SUM, WHOLE)]
    gathered = [p.span for p in pieces if (p.have, p.want) == (ROWS, WHOLE) or p in again]
    scattered = [p.span for p in pieces if (p.have, p.want) == (SUM, ROWS)]
    sliced = [p.span for p in pieces if (p.have, p.want) == (WHOLE, ROWS) or p in again]

    cut = _merge(p.span for p in pieces if p.have is ROWS)
    fewer = bool(scattered or sliced)
    path = [] if fewer else [Move("all_reduce", span, cut, cut) for span in _merge(reduced)]
    for span in _merge(gathered):
        path.append(Move("all_gather", span, cut, cut := _without(cut, span)))
    for span in sorted(_merge(scattered) + _merge(sliced), reverse=True):
        collective = "reduce_scatter" if span in _merge(scattered) else "slice"
        path.append(Move(collective, span, cut, cut := _merge((*cut, span))))
    path += [Move("all_reduce", span, cut, cut) for span in _merge(reduced)] if fewer else []
    return tuple(path)


def cut_of(layout: Layout, mesh: Mesh) -> Cut:
    """The spans by which a layout cuts rows."""
    return _merge(span for span, rows in _runs(layout, mesh).items() if rows is ROWS)


def _pieces(have: Layout, want: Layout, mesh: Mesh) -> list[_Piece]:
    """The digits of a rank's number that both layouts are made of, innermost first."""
    had, wanted = _runs(have, mesh), _runs(want, mesh)
    bounds = {bound for span in (*had, *wanted) for bound in span[:2]}
    if ROWS in (*had.values(), *wanted.values()):
        bounds.add(mesh.plan.tp)  # rows are dealt out along cp and tp
    found = []
    for low, high in pairwise(sorted(bounds)):
        if high % low:
            raise Refusal(
                f"no collective leads from {have} to {want} with {mesh.plan}",
                why=f"groups of {low} ranks do not nest in groups of {high}",
                fix="use experts=gathered, or sizes that divide one another",
            )
        found.append(_Piece(Span(low, high), _of(had, low), _of(wanted, low)))
    return found


def _runs(layout: Layout, mesh: Mesh) -> dict[Span, Rows]:
    """A layout as runs of ranks, innermost first, neighbours of one kind joined. All kinds are the same to one rank."""
    runs: list[tuple[Span, Rows]] = []
    for axis, rows in reversed(layout.axes):
        assert rows is not HOME, f"{layout} is of no stage yet"
        span = mesh.spans[axis]
        if span.size == 1:
            continue
        if runs and runs[-1][1] is rows:
            span = Span(runs.pop()[0].low, span.high)
        runs.append((span, rows))
    return dict(runs)


def _of(runs: dict[Span, Rows], low: int) -> Rows:
    return next(rows for span, rows in runs.items() if span.low <= low < span.high)


def _dealt_again(pieces: list[_Piece]) -> list[_Piece]:
    """Those whose rows are cut and stay so, inside of ranks whose rows change: they are gathered and dealt out again, since an
    inner cut is a cut of what the outer one left."""
    changed, found = False, []
    for piece in reversed(pieces):
        if piece.have is ROWS and piece.want is ROWS and changed:
            found.append(piece)
        changed = changed or (piece.have is ROWS) != (piece.want is ROWS)
    return found


def _merge(spans: Iterable[Span]) -> Cut:
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and merged[-1].high == span.low:
            span = Span(merged.pop().low, span.high)
        merged.append(span)
    return tuple(merged)


def _without(cut: Cut, gone: Span) -> Cut:
    """A cut less some of its ranks, which are the innermost of one of its spans."""
    rest = []
    for span in cut:
        if span.low == gone.low:
            span = Span(gone.high, span.high)
        if span.size > 1:
            rest.append(span)
    return tuple(rest)
