"""Strips: the rows of a large step pass its blocks run after run, so that what ranks send of one is on its way beside the products
of another. How long strips are is the plan's to say, how their rows are dealt out is deal's.

    this stream   out a | out b  | mlp a  | mlp b  | qkv a  | qkv b | attention of all rows
    beside it           | seam a | seam b | seam a | seam b |

A smaller step is one strip, and passes its seams on the stream that computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from trireme.parallel.aside import Done
from trireme.parallel.collectives import picked


class Coming(NamedTuple):
    """A strip on its way to a block."""

    rows: torch.Tensor
    done: Done
    kept: Any = None  # what it is made of, until it is here


class Strips:
    """All rows [N, H] that a block takes, strip after strip, to be iterated once: each strip is here once it is asked for, and is not
    kept then. A block that gives something of a strip before it asks for the next gains by it; one whose rows look at each other
    asks for the `whole`. Where only some rows go on from the block, it gives those."""

    def __init__(self, coming: Sequence[Coming], onward: torch.Tensor | slice = slice(None)):
        """`onward`: places of the rows that go on, int64 [n] where not all do."""
        self._coming, self.onward = list(coming), onward
        self.sizes = [len(strip.rows) for strip in coming]

    @classmethod
    def of(cls, rows: torch.Tensor) -> Strips:
        """Rows that are here, as one strip."""
        return cls([Coming(rows, Done())])

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self._coming:
            yield self._come()

    def whole(self) -> torch.Tensor:
        """Of all strips at once, and again as often as it is asked for."""
        rows = joined([*self])
        self._coming = [Coming(rows, Done())]
        return rows

    def with_onward(self, places: torch.Tensor | slice) -> Strips:
        """The same rows, here now, of which some go on."""
        return Strips([Coming(self.whole(), Done())], places)

    def going(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ...] of all rows -> of those that go on."""
        return picked(x, self.onward)

    def split(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """[n, ...] of those that go on, strip by strip."""
        return x.split(self.sizes) if self.all_go_on else [x]

    @property
    def all_go_on(self) -> bool:
        return isinstance(self.onward, slice) and self.onward == slice(None)

    def _come(self) -> torch.Tensor:
        """The next one, in a frame that is gone when a block has it: the iterator's would keep it."""
        strip = self._coming.pop(0)
        strip.done.wait()
        return strip.rows


def joined(strips: list[torch.Tensor]) -> torch.Tensor:
    """Strips [N, ...] each -> [sum of N, ...]."""
    return strips[0] if len(strips) == 1 else torch.cat(strips)
