"""Signature of causal_conv."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class CausalConv(Protocol):
    """Sizes a case may name: channels (C)."""

    def plan(self, counts: np.ndarray) -> Any:
        """counts int32 [I], rows of each item -> what depends on them alone: made once a step, used by `run` in every layer."""
        ...

    def run(self, x: Tensor, left: Tensor, weight: Tensor, plan: Any) -> Tensor:
        """x [N, C], item after item, left [I, K - 1, C]: the inputs before each item's first row, weight [C, K] -> [N, C]:
        silu(sum of weight[:, j] * the input K - 1 - j rows before), in float32, rounded once."""
        ...
