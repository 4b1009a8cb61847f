"""FedTokens: the token each slot sampled last, on stage 0, before the front knows it."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from trireme.core.step import FED
from trireme.parallel.link import ExpectedTokens


class _Owed(NamedTuple):
    number: int
    slots: np.ndarray  # int32 [num_samples]
    tokens: ExpectedTokens


class FedTokens:
    """A table by slot, filled by the returns of steps, in step order and only as far as a step needs: stage 0 never waits for
    a return that nobody asks for.

    `depth`: a return is surely here once so many later steps have begun (the front has no more in flight).
    """

    def __init__(self, max_num_seqs: int, depth: int):
        self._last = np.full(max_num_seqs, FED, dtype=np.int64)
        self._owed_by = np.full(max_num_seqs, -1, dtype=np.int64)  # number of the step that brings a slot's last token
        self._owed: deque[_Owed] = deque()
        self._depth = depth

    def owe(self, number: int, slots: np.ndarray, tokens: ExpectedTokens) -> None:
        """Step `number` will bring the tokens of `slots`."""
        self._owed.append(_Owed(number, slots, tokens))
        self._owed_by[slots] = number
        if len(self._owed) > self._depth:
            self._collect()

    def fill(self, tokens: np.ndarray, slots: np.ndarray) -> None:
        """Replace FED in `tokens` (int64 [T]) by the last token of its row's slot (`slots`: int32 [T]). May wait."""
        fed = np.flatnonzero(tokens == FED)
        if not len(fed):
            return
        needed = self._owed_by[slots[fed]].max()
        while self._owed and self._owed[0].number <= needed:
            self._collect()
        tokens[fed] = self._last[slots[fed]]
        assert (tokens[fed] >= 0).all(), "a fed token was sampled before, in this epoch"

    def _collect(self) -> None:
        owed = self._owed.popleft()
        self._last[owed.slots] = owed.tokens.wait().numpy()
