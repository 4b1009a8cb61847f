"""Layout: how a tensor's rows lie over the mesh, and which collective leads from one layout to another. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from trireme.core.refusal import Refusal


class Rows(Enum):
    """Along one axis of the mesh, a rank has ..."""

    WHOLE = "whole"  # every row
    ROWS = "rows"  # its cut of the rows
    SUM = "sum"  # every row, but only its share of a sum still owed


WHOLE, ROWS, SUM = Rows


@dataclass(frozen=True)
class Layout:
    """Rows over the axes that blocks cut by. An axis of one rank is WHOLE, ROWS and SUM at once."""

    tp: Rows = WHOLE
    cp: Rows = WHOLE

    def __str__(self) -> str:
        cut = [f"{axis}={getattr(self, axis).name}" for axis in AXES if getattr(self, axis) is not WHOLE]
        return f"lay({', '.join(cut)})"


AXES = ("tp", "cp")


def lay(tp: Rows = WHOLE, cp: Rows = WHOLE) -> Layout:
    """lay(tp=SUM): a sum over tp is owed."""
    return Layout(tp, cp)


class Move(NamedTuple):
    """One collective over one axis."""

    collective: str  # "all_reduce" | "reduce_scatter" | "all_gather" | "slice"
    axis: str


_TABLE: Mapping[tuple[Rows, Rows], str | None] = {
    (WHOLE, WHOLE): None,
    (ROWS, ROWS): None,
    (SUM, WHOLE): "all_reduce",
    (SUM, ROWS): "reduce_scatter",
    (ROWS, WHOLE): "all_gather",
    (WHOLE, ROWS): "slice",
}


def moves(have: Layout, want: Layout, sizes: Mapping[str, int]) -> tuple[Move, ...]:
    """The collectives from one layout to another on a mesh with these axis sizes. With one rank each is the identity, so
    none is left. Refusal for a pair that no collective joins, whatever the sizes."""
    path = []
    for axis in AXES:
        pair = getattr(have, axis), getattr(want, axis)
        if pair not in _TABLE:
            raise Refusal(
                f"no collective leads from {have} to {want} along {axis}",
                why=f"{pair[0].name} -> {pair[1].name} is not in the table",
                fix="let the block before give what the block after takes",
            )
        collective = _TABLE[pair]
        if collective is not None and sizes[axis] > 1:
            path.append(Move(collective, axis))
    return tuple(path)
