"""qk_rope_write in the Triton language: one program a row and head; q, k and v heads in one launch."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.qk_rope_write.op import QkRopeWrite


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> QkRopeWrite:
    return qk_rope_write


def qk_rope_write(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hk, D]
    v: Tensor,  # [T, Hk, D]
    cos_sin: Tensor,  # [L, D]
    positions: Tensor,  # [T]
    q_norm: Tensor | None,  # [D]
    k_norm: Tensor | None,  # [D]
    eps: float,
    k_pool: Tensor,  # [pages, Hk, PAGE, D]
    v_pool: Tensor,
    pages: Tensor,  # [T]
) -> Tensor:  # [T, Hq, D]
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    assert all(x.stride(-1) == 1 for x in (q, k, v, cos_sin, k_pool, v_pool)), "heads are contiguous"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_rows:
        _heads[(num_rows, num_heads + 2 * num_kv_heads)](
            q,
            k,
            v,
            cos_sin,
            positions,
            q if q_norm is None else q_norm,  # an unused pointer must still be one
            k if k_norm is None else k_norm,
            eps,
            out,
            k_pool,
            v_pool,
            pages,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            cos_sin.stride(0),
            *k_pool.stride()[:3],
            *v_pool.stride()[:3],
            HQ=num_heads,
            HK=num_kv_heads,
            PAGE=k_pool.shape[2],
            D=head_dim,
            BLOCK=triton.next_power_of_2(head_dim // 2),
            NORM_Q=q_norm is not None,
            NORM_K=k_norm is not None,
            num_warps=1,
        )
    return out


@triton.jit
def _heads(
    q, k, v, cos_sin, positions, q_norm, k_norm, eps, out, k_pool, v_pool, pages,
    q_row, q_head, k_row, k_head, v_row, v_head, angle_row, k_page, k_page_head, k_offset, v_page, v_page_head, v_offset,
    HQ: tl.constexpr, HK: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.load(pages + row)
    page, offset = place // PAGE, place % PAGE
    if head < HQ:
        source = q + row * q_row + head * q_head
        _turn(source, out + (row * HQ + head) * D, q_norm, cos_sin + tl.load(positions + row) * angle_row, eps, D, BLOCK, NORM_Q)
    elif head < HQ + HK:
        kv = head - HQ
        target = k_pool + page * k_page + kv * k_page_head + offset * k_offset
        _turn(k + row * k_row + kv * k_head, target, k_norm, cos_sin + tl.load(positions + row) * angle_row, eps, D, BLOCK, NORM_K)
    else:
        kv = head - HQ - HK
        low = tl.arange(0, BLOCK)
        inside = low < D // 2
        source = v + row * v_row + kv * v_head
        target = v_pool + page * v_page + kv * v_page_head + offset * v_offset
        tl.store(target + low, tl.load(source + low, mask=inside), mask=inside)
        tl.store(target + D // 2 + low, tl.load(source + D // 2 + low, mask=inside), mask=inside)


@triton.jit
def _turn(source, target, weight, angles, eps, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr):
    """One head: optional norm, rotation, store. Its halves stay apart, since the rotation pairs them."""
    low = tl.arange(0, BLOCK)
    inside = low < D // 2
    a = tl.load(source + low, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + D // 2 + low, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        kind = source.dtype.element_ty
        scale = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / D + eps)
        weight_a = tl.load(weight + low, mask=inside, other=0.0).to(tl.float32)
        weight_b = tl.load(weight + D // 2 + low, mask=inside, other=0.0).to(tl.float32)
        a = ((a * scale).to(kind).to(tl.float32) * weight_a).to(kind).to(tl.float32)  # rounded as rms_norm rounds
        b = ((b * scale).to(kind).to(tl.float32) * weight_b).to(kind).to(tl.float32)
    cos = tl.load(angles + low, mask=inside, other=0.0)
    sin = tl.load(angles + D // 2 + low, mask=inside, other=0.0)
    kind = target.dtype.element_ty
    tl.store(target + low, (a * cos - b * sin).to(kind), mask=inside)
    tl.store(target + D // 2 + low, (b * cos + a * sin).to(kind), mask=inside)
