"""delta_step in PyTorch, all items at once and row by row; its definition. CPUs decode with it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.causal_conv.reference import convolve
from trireme_kernels.delta_step.op import DeltaStep
from trireme_kernels.gated_delta.gates import gates
from trireme_kernels.gated_delta.rectangle import Rectangle
from trireme_kernels.gated_delta.reference import recur
from trireme_kernels.gated_rms_norm.reference import gated_rms_norm
from trireme_kernels.upload import upload


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> DeltaStep:
    return Reference(case)


class _Aside(NamedTuple):
    """What is held instead of taken, int64."""

    items: Tensor  # that hold
    rows: Tensor  # theirs
    owners: Tensor  # the item of each row
    places: Tensor  # and its number there


class _Plan(NamedTuple):
    rows: Rectangle
    counts: Tensor  # int64 [I]
    replays: Tensor  # int64 [I]
    num_replays: int  # the most
    aside: _Aside | None


class Reference:
    def __init__(self, case: Case):
        self.device = case.device

    def plan(self, counts: np.ndarray, replays: np.ndarray, holds: np.ndarray) -> _Plan:
        counts, replays, holds = np.asarray(counts), np.asarray(replays), np.asarray(holds)
        aside = None
        if holds.any():
            owners = np.repeat(np.arange(len(counts)), counts)
            places = np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]
            rows = np.flatnonzero(holds[owners])
            aside = _Aside(*(self._tensor(numbers) for numbers in (np.flatnonzero(holds), rows, owners[rows], places[rows])))
        return _Plan(Rectangle(counts, self.device), self._tensor(counts), self._tensor(replays), int(replays.max(initial=0)), aside)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return upload(values.astype(np.int64), self.device)

    def run(
        self,
        qkv: Tensor,  # [N, C]
        a: Tensor,  # [N, Hv]
        b: Tensor,  # [N, Hv]
        gate: Tensor,  # [N, Hv, Dv]
        weight: Tensor,  # [C, K]
        log_decay: Tensor,  # [Hv]
        dt_bias: Tensor,  # [Hv]
        norm: Tensor,  # [Dv]
        eps: float,
        inputs: Tensor,  # [S, K - 1, C]
        states: Tensor,  # [S, Hv, Dk, Dv]
        held: Tensor,  # [slots, R, C + 2 Hv]
        slots: Tensor,  # [I]
        fresh: Tensor,  # [I]
        plan: _Plan,
    ) -> Tensor:  # [N, Hv, Dv]
        window = inputs.index_select(0, slots).masked_fill_(fresh[:, None, None], 0)
        state = states.index_select(0, slots).masked_fill_(fresh[:, None, None, None], 0)
        num_channels, num_heads = qkv.shape[1], a.shape[1]
        if plan.num_replays:
            again = held[:, : plan.num_replays].index_select(0, slots)
            rows, again_a, again_b = again.split((num_channels, num_heads, num_heads), dim=-1)
            stand = torch.arange(plan.num_replays, device=qkv.device) < plan.replays[:, None]
            g, beta = (each * stand[:, :, None] for each in gates(again_a, again_b, log_decay, dt_bias))
            _, window = _take(rows, g, beta, weight, window, state, plan.replays)
        aside = plan.aside
        before = [] if aside is None else [window[aside.items], state[aside.items]]
        g, beta = (plan.rows.fill(each) for each in gates(a, b, log_decay, dt_bias))
        out, window = _take(plan.rows.fill(qkv), g, beta, weight, window, state, plan.counts)
        if aside is not None:
            window[aside.items], state[aside.items] = before
            held[slots[aside.owners], aside.places] = torch.cat((qkv, a, b), dim=-1)[aside.rows]
        inputs.index_copy_(0, slots, window)
        states.index_copy_(0, slots, state)
        return gated_rms_norm(plan.rows.flat(out), gate, norm, eps)

    def captured(self, num_items: int, width: int) -> None:
        """None: the longest item's rows are launches of their own."""


def _take(
    rows: Tensor,  # [I, T, C]
    g: Tensor,  # [I, T, Hv]
    beta: Tensor,  # [I, T, Hv]
    weight: Tensor,  # [C, K]
    window: Tensor,  # [I, K - 1, C]
    state: Tensor,  # [I, Hv, Dk, Dv], updated in place
    counts: Tensor,  # [I]
) -> tuple[Tensor, Tensor]:  # [I, T, Hv, Dv], [I, K - 1, C]
    """Outputs of rows, and the inputs before the next row."""
    num_heads, key_dim, value_dim = state.shape[1:]
    line = torch.cat((window, rows), dim=1)
    values = num_heads * value_dim
    keys = (rows.shape[2] - values) // 2
    q, k, v = convolve(line, weight).split((keys, keys, values), dim=-1)
    q, k, v = q.unflatten(-1, (-1, key_dim)), k.unflatten(-1, (-1, key_dim)), v.unflatten(-1, (-1, value_dim))
    last = counts[:, None] + torch.arange(window.shape[1], device=rows.device)  # [I, K - 1]
    return recur(q, k, v, g, beta, state), line.gather(1, last[:, :, None].expand_as(window))
