"""ToldRows: the experts of rows on their way to a file: in a stage's leader, in its courier, and with the service that records them."""

from __future__ import annotations

from collections import deque

import numpy as np

COLUMNS = ("epoch", "number", "slot", "position")  # of a row: its step, and its place in a sequence

MOST_PUSHED_BYTES = 8 << 20  # that one push carries: messages to the service go through memory that the server never gives back


class ToldRows:
    """The newest rows that fit into `most_bytes`; older ones are left out, and counted."""

    def __init__(self, most_bytes: int):
        self._most_bytes = most_bytes
        self._parts: deque[tuple[np.ndarray, np.ndarray]] = deque()
        self._num_bytes = 0
        self.left_out = 0

    @property
    def num_rows(self) -> int:
        return sum(len(rows) for rows, _ in self._parts)

    def add(self, rows: bytes, experts: bytes, left_out: int = 0) -> None:
        """int32 [n, columns] and int16 [n, layers with experts * experts of a row]; rows that were left out before they came here."""
        self.left_out += left_out
        if not rows:
            return
        where = np.frombuffer(rows, np.int32).reshape(-1, len(COLUMNS))
        part = (where, np.frombuffer(experts, np.int16).reshape(len(where), -1))
        self._parts.append(part)
        self._num_bytes += _size(part)
        while self._num_bytes > self._most_bytes:
            oldest = self._parts.popleft()
            self._num_bytes -= _size(oldest)
            each = _size(oldest) // len(oldest[0])
            kept = max(0, (self._most_bytes - self._num_bytes) // each)  # fewer than it has, or it would still be there
            self.left_out += len(oldest[0]) - kept
            if kept:
                self._parts.appendleft((oldest[0][-kept:], oldest[1][-kept:]))
                self._num_bytes += kept * each

    def take(self) -> tuple[bytes, bytes, int]:
        """(rows, experts, left out) as in `add`; nothing is kept."""
        rows, experts, left_out = *self.arrays(), self.left_out
        self._parts.clear()
        self._num_bytes = self.left_out = 0
        return rows.tobytes(), experts.tobytes(), left_out

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 [n, columns], int16 [n, numbers of a row], the oldest first."""
        if not self._parts:
            return np.zeros((0, len(COLUMNS)), np.int32), np.zeros((0, 0), np.int16)
        return np.concatenate([rows for rows, _ in self._parts]), np.concatenate([experts for _, experts in self._parts])


def _size(part: tuple[np.ndarray, np.ndarray]) -> int:
    return part[0].nbytes + part[1].nbytes
