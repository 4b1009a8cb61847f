"""Rectangle: rows of items of various lengths as one tensor, filled up with zeros."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trireme_kernels.upload import upload


class Rectangle:
    """Rows [N, ..], item after item, as [I, T, ..], T rows of the longest item; counts int [I]."""

    def __init__(self, counts: np.ndarray, device: str | torch.device):
        self.num_items, self.num_rows = len(counts), int(np.max(counts, initial=0))
        real = np.arange(self.num_rows) < np.asarray(counts)[:, None]
        self._places = None if real.all() else upload(np.flatnonzero(real), device)  # int64 [N]

    def fill(self, x: Tensor) -> Tensor:  # [N, ..] -> [I, T, ..]
        if self._places is None:
            return x.unflatten(0, (self.num_items, self.num_rows))
        return (
            x.new_zeros(self.num_items * self.num_rows, *x.shape[1:])
            .index_copy_(0, self._places, x)
            .unflatten(0, (self.num_items, self.num_rows))
        )

    def flat(self, x: Tensor) -> Tensor:  # [I, T, ..] -> [N, ..]
        rows = x.flatten(0, 1)
        return rows if self._places is None else rows.index_select(0, self._places)
