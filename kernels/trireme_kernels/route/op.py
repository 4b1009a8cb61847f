"""Signature of route."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class Route(Protocol):
    """Sizes a case may name: num_experts."""

    def __call__(self, logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
        """logits [T, E] -> (weights float32 [T, top_k], expert ids int64 [T, top_k]), heaviest first.

        Weights are a softmax in float32 over all experts. Of equal ones (common, where logits are bfloat16) the lower id
        comes first, so that every rank and device that sees the same logits picks the same experts. `renormalise` divides
        the chosen weights by their sum.
        """
        ...
