"""route in the Triton language: one program a block of rows, which takes the heaviest expert of each row top_k times."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv, next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.jit import jit
from trireme_kernels.pdl import after_earlier, early
from trireme_kernels.route.op import Route

_MOST_EXPERTS = 1024
_BLOCK = 512  # logits of one program; a row of more experts has a program to itself


def fits(case: Case) -> str | None:
    if case.sizes.get("num_experts", 0) > _MOST_EXPERTS:
        return f"num_experts={case.sizes['num_experts']} is over {_MOST_EXPERTS}"
    return None


def build(case: Case) -> Route:
    return route


def route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:  # [T, E] -> [T, top_k] x 2
    num_rows, num_experts = logits.shape
    assert top_k <= num_experts and logits.stride(1) == 1
    weights = torch.empty(num_rows, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, top_k, dtype=torch.int64, device=logits.device)
    if num_rows:
        experts = next_power_of_2(num_experts)
        rows = max(1, _BLOCK // experts)
        _route_rows[(cdiv(num_rows, rows),)](
            logits,
            weights,
            ids,
            num_rows,
            num_experts,
            logits.stride(0),
            TOP_K=top_k,
            RENORMALISE=renormalise,
            ROWS=rows,
            EXPERTS=experts,
            CHOSEN=next_power_of_2(top_k),
            **early(logits),
        )
    return weights, ids


@jit(do_not_specialize=["num_rows"])
def _route_rows(
    logits, weights, ids, num_rows, num_experts, row_stride,
    TOP_K: tl.constexpr, RENORMALISE: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, CHOSEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    known = (expert < num_experts)[None, :]
    after_earlier(PDL)
    line = logits + tl.minimum(row, num_rows - 1)[:, None] * row_stride  # rows past the last are the last again, not stored
    value = tl.load(line + expert[None, :], mask=known, other=float("-inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, axis=1)[:, None])
    weight = value / tl.sum(value, axis=1)[:, None]
    # Weight and id in one integer, as in the reference: its largest is the heaviest expert, of equals the lowest.
    key = (weight.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (num_experts - 1 - expert).to(tl.int64)[None, :]
    lowest = -0x8000000000000000
    key = tl.where(known, key, lowest)
    best = tl.zeros([ROWS, CHOSEN], tl.int64)
    place = tl.arange(0, CHOSEN)
    for nth in range(TOP_K):
        top = tl.max(key, axis=1)
        best = tl.where((place == nth)[None, :], top[:, None], best)
        key = tl.where(key == top[:, None], lowest, key)
    chosen = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)  # 0 in places past TOP_K
    if RENORMALISE:
        chosen = chosen / tl.sum(chosen, axis=1)[:, None]
    target = row[:, None] * TOP_K + place[None, :]
    real = (row < num_rows)[:, None] & (place < TOP_K)[None, :]
    tl.store(weights + target, chosen, mask=real)
    tl.store(ids + target, num_experts - 1 - (best & 0xFFFFFFFF), mask=real)
