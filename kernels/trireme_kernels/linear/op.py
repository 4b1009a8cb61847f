"""Signature of linear."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class Linear(Protocol):
    """Sizes a case may name: num_in (K), num_out (N)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """x [T, K], weight [N, K], bias [N] or None -> x @ weight.T + bias [T, N] of `dtype` (None: x's).

        A weight is constant: it may be read before what was launched earlier is done (see pdl.py), so nothing writes one
        while steps run.
        """
        ...
