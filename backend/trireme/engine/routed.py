"""RoutedRows: which experts the rows of one sequence were given, on their way to its user."""

from __future__ import annotations

import numpy as np


class RoutedRows:
    """Each row once, in order, however often it is computed: a sequence that was preempted begins again at its first row."""

    def __init__(self) -> None:
        self._num_rows = 0  # taken ever, from position 0 on
        self._untold: list[np.ndarray] = []

    def take(self, start: int, rows: np.ndarray) -> None:
        """int16 [n, layers * experts of a row], of a step that computed the positions from `start` on."""
        assert start <= self._num_rows, "no row is skipped, since no page of others stands in"
        fresh = rows[self._num_rows - start :]
        self._num_rows += len(fresh)
        self._untold.append(fresh)

    def tell(self) -> np.ndarray | None:
        """Rows since the last time."""
        if not self._untold:
            return None
        untold, self._untold = self._untold, []
        return np.concatenate(untold)
