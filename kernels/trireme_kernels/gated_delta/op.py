"""Signature of gated_delta."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from torch import Tensor

IMPLEMENTATIONS = ("tl", "fla", "chunked", "reference")


class GatedDelta(Protocol):
    """Sizes a case must name: num_key_heads (Hk), num_value_heads (Hv), key_dim (Dk), value_dim (Dv).

    Hv is a multiple of Hk; value head j has the query and key of key head j // (Hv / Hk). A state S [Dk, Dv] of a value
    head takes a row and gives its output:

        S = exp(g) S;  S = S + k (beta (v - S^T k))^T;  o = S^T q / sqrt(Dk)        q, k: L2-normalised, eps 1e-6
    """

    def plan(self, counts: np.ndarray) -> Any:
        """counts int32 [I], rows of each item, also none -> what depends on them alone: made once a step, used by `run` in
        every layer."""
        ...

    def run(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
        """q, k [N, Hk, Dk], v [N, Hv, Dv], g, beta float32 [N, Hv], item after item, initial float32 [I, Hv, Dk, Dv]
        -> (o [N, Hv, Dv] of q's dtype, final float32 [I, Hv, Dk, Dv], new)."""
        ...
