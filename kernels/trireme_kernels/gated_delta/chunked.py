"""gated_delta in PyTorch by matrix products: chunks of up to 64 rows, and a loop over chunks only to carry states.

Inside a chunk the rule is a triangular system (Yang et al., "Gated Delta Networks", 2024, section 3.3). With G the running
sum of g from the chunk's begin and S the state before it, rows i learn

    n_i = beta_i (v_i - exp(G_i) S^T k_i - sum over j < i of exp(G_i - G_j) (k_i . k_j) n_j)

so that N = U - W S, where U and W solve the same system for all chunks at once. Items are cut into chunks of their own, the
last one filled up with rows of zeros, which leave a state alone. Then in turn the first chunks of all items, the second ones:

    item 0: 3 chunks, item 1: 1 chunk, item 2: 2 chunks        chunks 0 3 4, of items 0 1 2; 1 5, of 0 2; 2, of 0
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.gated_delta.op import GatedDelta
from trireme_kernels.gated_delta.rectangle import Rectangle
from trireme_kernels.gated_delta.reference import unit
from trireme_kernels.upload import upload

_ROWS = 64  # of a chunk


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> GatedDelta:
    return Chunked(case)


class _Turn(NamedTuple):
    """Chunks whose states are known once those of the turn before are, one of each item that has so many."""

    chunks: Tensor  # int64
    items: Tensor  # int64


class _Plan(NamedTuple):
    chunks: Rectangle
    turns: list[_Turn]


class Chunked:
    def __init__(self, case: Case):
        self.device = case.device

    def plan(self, counts: np.ndarray) -> _Plan:
        counts = np.asarray(counts)
        num_rows = min(_ROWS, max(1, int(counts.max(initial=0))))
        num_chunks = -(-counts // num_rows)
        first = np.cumsum(num_chunks) - num_chunks
        item = np.repeat(np.arange(len(counts)), num_chunks)
        place = np.arange(len(item)) - first[item]
        turns = [np.flatnonzero(place == turn) for turn in range(int(num_chunks.max(initial=0)))]
        return _Plan(
            Rectangle(np.minimum(num_rows, counts[item] - place * num_rows), self.device),
            [_Turn(self._tensor(chunks), self._tensor(item[chunks])) for chunks in turns],
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return upload(values.astype(np.int64), self.device)

    def run(
        self,
        q: Tensor,  # [N, Hk, Dk]
        k: Tensor,  # [N, Hk, Dk]
        v: Tensor,  # [N, Hv, Dv]
        g: Tensor,  # [N, Hv]
        beta: Tensor,  # [N, Hv]
        initial: Tensor,  # [I, Hv, Dk, Dv]
        plan: _Plan,
    ) -> tuple[Tensor, Tensor]:  # [N, Hv, Dv], [I, Hv, Dk, Dv]
        num_heads, dtype, final = v.shape[1], q.dtype, initial.clone()
        # From here on [chunks, Hv, rows, ..]
        q, k, v, g, beta = (plan.chunks.fill(x).transpose(1, 2) for x in (unit(q, num_heads), unit(k, num_heads), v.float(), g, beta))
        q = q * q.shape[-1] ** -0.5
        total = g.cumsum(-1)
        later = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
        decay = (total[..., :, None] - total[..., None, :]).masked_fill_(later, -torch.inf).exp_()  # of row j until row i
        since, until = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]  # the chunk's begin; its end

        system = (k @ k.transpose(-1, -2)).mul_(decay).mul_(beta[..., None])  # its diagonal is taken for ones
        known = torch.cat((v, k * since), dim=-1).mul_(beta[..., None])
        u, w = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True).split((v.shape[-1], k.shape[-1]), dim=-1)
        scores = (q @ k.transpose(-1, -2)).mul_(decay)
        q, k, all_decay = q * since, k * until, since[:, :, -1:]

        out = torch.empty_like(v)
        for chunks, items in plan.turns:
            state = final.index_select(0, items)
            learnt = u.index_select(0, chunks) - w.index_select(0, chunks) @ state
            out.index_copy_(0, chunks, q.index_select(0, chunks) @ state + scores.index_select(0, chunks) @ learnt)
            state = state * all_decay.index_select(0, chunks) + k.index_select(0, chunks).transpose(-1, -2) @ learnt
            final.index_copy_(0, items, state)
        return plan.chunks.flat(out.transpose(1, 2).to(dtype)), final
