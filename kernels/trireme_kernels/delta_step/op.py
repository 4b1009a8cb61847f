"""Signature of delta_step."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from torch import Tensor

IMPLEMENTATIONS = ("tl", "reference")


class DeltaStep(Protocol):
    """Sizes a case may name: num_key_heads (Hk), num_value_heads (Hv), key_dim (Dk), value_dim (Dv), kernel (K).

    An item's inputs and state first take `replays` rows of what its slot held, then its own rows; where it holds, its own
    rows give outputs, and are written to what the slot holds instead:

        state --replays--> state --counts--> state          a decode
        state --replays--> state;  rows --> held            a token and drafts
    """

    def plan(self, counts: np.ndarray, replays: np.ndarray, holds: np.ndarray) -> Any:
        """counts, replays int32 [I], holds bool [I] -> what depends on them alone: made once a step, used by `run` in every
        layer."""
        ...

    def run(
        self,
        qkv: Tensor,
        a: Tensor,
        b: Tensor,
        gate: Tensor,
        weight: Tensor,
        log_decay: Tensor,
        dt_bias: Tensor,
        norm: Tensor,
        eps: float,
        inputs: Tensor,
        states: Tensor,
        held: Tensor,
        slots: Tensor,
        fresh: Tensor,
        plan: Any,
    ) -> Tensor:
        """qkv [N, C] (query, key and value heads, C = 2 Hk Dk + Hv Dv), a, b [N, Hv], gate [N, Hv, Dv], item after item,
        weight [C, K], log_decay (A_log), dt_bias float32 [Hv], norm [Dv]; pools, written in place: inputs [S, K - 1, C],
        states float32 [S, Hv, Dk, Dv], held [slots, R, C + 2 Hv] (rows of qkv, a, b); slots int64 [I], all different, fresh
        bool [I]: inputs and state are zero -> [N, Hv, Dv] of qkv's dtype.

        A row's output is that of causal_conv, gates, gated_delta and gated_rms_norm, in turn.
        """
        ...

    def captured(self, num_items: int, width: int) -> CapturedDeltaStep | None:
        """Steps of up to `num_items` items of up to `width` rows inside a CUDA graph; None where the implementation cannot be
        captured."""
        ...


class CapturedDeltaStep(Protocol):
    """A graph holds its launches and the addresses of its buffers, and `plan` writes those in the stream's order, outside of
    the graph, before each replay: as paged_attention's CapturedDecode. Item i's rows begin at i * width. Outputs of rows that are
    no item's are zero, and items past those planned change nothing, whatever their slots and `fresh` are."""

    def plan(self, counts: np.ndarray, replays: np.ndarray, holds: np.ndarray) -> None:
        """As DeltaStep's, of n <= num_items items."""
        ...

    def run(
        self,
        qkv: Tensor,
        a: Tensor,
        b: Tensor,
        gate: Tensor,
        weight: Tensor,
        log_decay: Tensor,
        dt_bias: Tensor,
        norm: Tensor,
        eps: float,
        inputs: Tensor,
        states: Tensor,
        held: Tensor,
        slots: Tensor,
        fresh: Tensor,
    ) -> Tensor:
        """As DeltaStep's; slots and fresh are of num_items items."""
        ...
