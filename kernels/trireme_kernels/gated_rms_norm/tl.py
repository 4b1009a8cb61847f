"""gated_rms_norm in the Triton language: one program some heads of a row."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv, next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.gated_rms_norm.op import GatedRmsNorm
from trireme_kernels.jit import jit
from trireme_kernels.pdl import after_earlier, early
from trireme_kernels.rms_norm.tl import scaled

_NUMBERS = 1024  # of a program


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> GatedRmsNorm:
    return gated_rms_norm


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:  # [.., D] twice, [D] -> [.., D]
    assert x.stride(-1) == gate.stride(-1) == 1, "heads are contiguous"
    dim = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # [rows, heads, D], as strides allow: a gate is often part of a wider projection
    heads = x.shape[-2] if x.ndim > 2 else 1
    x, gate = x.reshape(-1, heads, dim), gate.reshape(-1, heads, dim)
    if len(x):
        block = next_power_of_2(dim)
        together = min(next_power_of_2(heads), max(1, _NUMBERS // block))
        _gated_rms_norm_heads[(len(x), cdiv(heads, together))](
            x, gate, weight, out, *x.stride()[:2], *gate.stride()[:2], heads, dim, eps, HEADS=together, BLOCK=block, **early(x)
        )
    return out


@jit
def _gated_rms_norm_heads(
    x, gate, weight, out, x_row, x_head, gate_row, gate_head, num_heads, dim, eps,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < num_heads) & (column < dim)
    scale = tl.load(weight + column, mask=column < dim, other=0.0)
    after_earlier(PDL)
    value = tl.load(x + row * x_row + head * x_head + column, mask=inside, other=0.0).to(tl.float32)
    opening = tl.load(gate + row * gate_row + head * gate_head + column, mask=inside, other=0.0).to(tl.float32)
    result = normed_and_gated(value, scale, opening, dim, eps, out.dtype.element_ty)
    tl.store(out + (row * num_heads + head) * dim + column, result, mask=inside)


@triton.jit
def normed_and_gated(value, scale, opening, dim, eps, kind: tl.constexpr):
    """value, opening float32 [HEADS, BLOCK], numbers past a head's own zero, scale [1, BLOCK] -> [HEADS, BLOCK] of `kind`."""
    normed = value * tl.rsqrt(tl.sum(value * value, axis=1) / dim + eps)[:, None]
    return (scaled(normed, scale, kind).to(tl.float32) * opening * tl.sigmoid(opening)).to(kind)
