"""FedTokens: the token each slot sampled last, on stage 0, before the front knows it. On a GPU the host does not know it either."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from trireme.core.step import FED
from trireme.parallel.link import ExpectedTokens
from trireme.ranks.staging import upload


class _Owed(NamedTuple):
    number: int
    slots: torch.Tensor  # int64 [num_samples]
    tokens: ExpectedTokens


class FedTokens:
    """A table by slot, on the device, filled by the returns of steps, in step order and only as far as a step needs: stage 0
    never waits for a return that nobody asks for.

    `depth`: a return is surely here once so many later steps have begun (the front has no more in flight).
    """

    def __init__(self, max_num_seqs: int, depth: int, device: torch.device):
        self._nobody = max_num_seqs  # the table's last row takes tokens that are never FED
        self._last = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)  # graphs keep its address
        self._depth = depth
        self.clear()

    def clear(self) -> None:
        """Forget all sequences, and drop what is on its way."""
        self._owed_by = np.full(len(self._last), -1, dtype=np.int64)  # number of the step that brings a slot's last token
        self._owed: deque[_Owed] = deque()

    def owe(self, number: int, slots: np.ndarray, feeds: np.ndarray, tokens: ExpectedTokens) -> None:
        """Step `number` will bring the tokens of `slots` (int32 [num_samples]); `feeds` (bool [num_samples]): which may be FED. A
        slot that has one such token has no other in a step."""
        [there] = upload([np.where(feeds, slots, self._nobody).astype(np.int64)], self._last.device)
        self._owed.append(_Owed(number, there, tokens))
        self._owed_by[slots] = np.where(feeds, number, -1)
        if len(self._owed) > self._depth:
            self._collect()

    def await_slots(self, slots: np.ndarray) -> None:
        """Have the last tokens of these slots in the table (`slots`: int32 [n]). May wait."""
        if not len(slots):
            return
        needed = self._owed_by[slots]
        assert needed.min() >= 0, "a fed token was sampled before, in this epoch"
        self.collect(int(needed.max()))

    def collect(self, number: int) -> None:
        """Have the tokens of all steps up to `number` in the table, those that are not dropped. May wait."""
        while self._owed and self._owed[0].number <= number:
            self._collect()

    def fill(self, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """int64 [N], FED among them, of the rows' slots int64 [N] -> int64 [N] with the last token of its slot in place of FED."""
        return torch.where(tokens == FED, self._last[slots], tokens)

    def _collect(self) -> None:
        owed = self._owed.popleft()
        self._last[owed.slots] = owed.tokens.wait().to(self._last.device, torch.int64, non_blocking=True)
