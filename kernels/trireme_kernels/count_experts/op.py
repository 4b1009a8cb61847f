"""Signature of count_experts."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class CountExperts(Protocol):
    """Sizes a case may name: num_experts."""

    def __call__(self, experts: Tensor, num_rows: Tensor | None, counts: Tensor) -> None:
        """experts int64 [T, top_k], counts int32 [E]: counts[e] grows by how often e is in the first `num_rows` rows, an
        int64 [1] on their device, since a CUDA graph's padding follows; None: in all of them.
        """
        ...
