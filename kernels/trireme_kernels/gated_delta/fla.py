"""gated_delta by flash-linear-attention (fla-core): its chunked kernels in the Triton language.

A first run with heads of some sizes compiles them and picks their tiles by trial, whatever the number of rows. `build` does
that, on rows as of a long prompt; no request waits for it.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.gated_delta.op import GatedDelta
from trireme_kernels.upload import upload

_ROWS = 64  # of a chunk; its default
_TRIAL_ROWS = 2048
_MOST_KEY_DIM = 256


def fits(case: Case) -> str | None:
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 and float16, not in {str(case.dtype).removeprefix('torch.')}"
    if case.sizes["key_dim"] > _MOST_KEY_DIM:
        return f"key_dim={case.sizes['key_dim']} is over {_MOST_KEY_DIM}"
    return None


def build(case: Case) -> GatedDelta:
    return Fla(case)


class _Plan(NamedTuple):
    bounds: Tensor  # int64 [B + 1], of the B items that have rows: the package wants none without
    chunks: Tensor  # int64 [chunks, 2]: item, number in the item. The package would make it, and wait for the device
    items: Tensor | None  # int64 [B]; None: all


class Fla:
    def __init__(self, case: Case):
        self.device = case.device
        if case.device == "cuda":
            self._try(case)

    def _try(self, case: Case) -> None:
        sizes = case.sizes
        heads, key_dim, value_dim = sizes["num_value_heads"], sizes["key_dim"], sizes["value_dim"]
        keys = torch.zeros(_TRIAL_ROWS, sizes["num_key_heads"], key_dim, dtype=case.dtype, device=case.device)
        values = torch.zeros(_TRIAL_ROWS, heads, value_dim, dtype=case.dtype, device=case.device)
        gate = torch.zeros(_TRIAL_ROWS, heads, device=case.device)
        initial = torch.zeros(1, heads, key_dim, value_dim, device=case.device)
        self.run(keys, keys, values, gate, gate, initial, self.plan(np.array([_TRIAL_ROWS])))

    def plan(self, counts: np.ndarray) -> _Plan:
        counts = np.asarray(counts, np.int64)
        items = np.flatnonzero(counts)
        bounds = np.append(0, np.cumsum(counts[items]))
        num_chunks = -(-counts[items] // _ROWS)
        item = np.repeat(np.arange(len(items)), num_chunks)
        chunks = np.stack((item, np.arange(len(item)) - (np.cumsum(num_chunks) - num_chunks)[item]), axis=1)
        return _Plan(upload(bounds, self.device), upload(chunks, self.device), None if counts.all() else upload(items, self.device))

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
        if not len(q):
            return torch.empty_like(v), initial.clone()
        out, final = chunk_gated_delta_rule(
            *(x[None] for x in (q, k, v, g, beta)),
            initial_state=initial if plan.items is None else initial.index_select(0, plan.items),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=plan.bounds,
            chunk_indices=plan.chunks,
        )
        return out[0], final if plan.items is None else initial.index_copy(0, plan.items, final)
