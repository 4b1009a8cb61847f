"""Pages: which pages are free, held by sequences, or kept for reuse under a name.
What names mean is prefix's matter; contents are the ranks'."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class Pages:
    """`num_pages` page numbers, the same on every stage.

    free --take--> held by 1 --hold--> held by more --drop--> held by none: kept if it has a name, else free
    kept --hold--> held;  kept --take, when nothing is free--> loses its name, least recently dropped first
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._name_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently dropped first

    @property
    def num_free(self) -> int:
        """Pages that `take` can give: free and kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Pages held by sequences."""
        return self.num_pages - self.num_free

    def take(self, count: int) -> list[int]:
        """`count` pages with one holder each and no name; the caller has seen that num_free is enough."""
        assert count <= self.num_free, f"{count} pages asked, {self.num_free} free"
        while len(self._free) < count:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
            self._free.append(page)
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        for page in taken:
            self._holders[page] = 1
        return taken

    def hold(self, pages: Iterable[int]) -> None:
        """One holder more for named pages, as found by `find`."""
        for page in pages:
            if self._holders[page] == 0:
                del self._kept[page]
            self._holders[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """One holder less. Pages are those of one sequence in order; the last go first, so that prefixes live longest."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} dropped but not held"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if self._name_of[page] is None:
                    self._free.append(page)
                else:
                    self._kept[page] = None

    def name(self, page: int, name: bytes) -> None:
        """Let `find` see a held, wholly computed page; where another page has the name already, that one stays."""
        assert self._holders[page] > 0, f"page {page} named but not held"
        if name not in self._page_of and self._name_of[page] is None:
            self._page_of[name], self._name_of[page] = page, name

    def find(self, name: bytes) -> int | None:
        return self._page_of.get(name)

    def _forget(self, page: int) -> None:
        name = self._name_of[page]
        assert name is not None, "only named pages are kept"
        del self._page_of[name]
        self._name_of[page] = None
