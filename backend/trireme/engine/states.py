"""Snapshots: which copy of a sequence's states stands for which prefix, so that another can begin from it. What a prefix is called
is prefix's matter; copies are the ranks'."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Snapshots:
    """`num_snapshots` rows, the same on every stage, by the name of a prefix's last page.

    Steps run in order on every stage, so a row may be given to another prefix by any later step than the one that reads it:
    nobody holds a snapshot.
    """

    def __init__(self, num_snapshots: int):
        self.num_snapshots = num_snapshots
        self._rows: OrderedDict[bytes, int] = OrderedDict()  # by name, least recently used first

    @property
    def num_used(self) -> int:
        return len(self._rows)

    def find(self, name: bytes) -> int | None:
        """The row of a prefix; it is used now."""
        if name in self._rows:
            self._rows.move_to_end(name)
        return self._rows.get(name)

    def longest(self, names: Sequence[bytes]) -> tuple[int, int]:
        """(pages of the longest prefix that has a snapshot, its row), of the names of a prefix's pages; (0, -1) where none has."""
        for num_pages in range(len(names), 0, -1):
            row = self.find(names[num_pages - 1])
            if row is not None:
                return num_pages, row
        return 0, -1

    def take(self, name: bytes) -> int:
        """A row for a prefix that has none: the least recently used loses its own where all are in use."""
        assert name not in self._rows, "one prefix has one snapshot"
        full = len(self._rows) == self.num_snapshots
        row = self._rows.popitem(last=False)[1] if full else len(self._rows)
        self._rows[name] = row
        return row
