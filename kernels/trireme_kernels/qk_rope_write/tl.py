"""qk_rope_write in the Triton language: one program a row and some heads, all of q, of k or of v; one launch."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trireme_kernels.blocks import cdiv, next_power_of_2
from trireme_kernels.case import Case
from trireme_kernels.jit import jit
from trireme_kernels.pdl import after_earlier, early
from trireme_kernels.qk_rope_write.op import QkRopeWrite

_HEADS, _WARPS = 8, 4  # of a program; the best of a sweep on an H100


def fits(case: Case) -> str | None:
    return None


def build(case: Case) -> QkRopeWrite:
    return qk_rope_write


def qk_rope_write(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hk, D]
    v: Tensor,  # [T, Hk, D]
    cos_sin: Tensor,  # [L, R]
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
    (*q_strides, q_one), (*k_strides, k_one), (*v_strides, v_one) = q.stride(), k.stride(), v.stride()
    (*k_places, k_pool_one), (*v_places, v_pool_one) = k_pool.stride(), v_pool.stride()
    angle_row, angle_one = cos_sin.stride()
    assert q_one == k_one == v_one == k_pool_one == v_pool_one == angle_one == 1, "heads are contiguous"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_rows:
        q_parts, kv_parts = cdiv(num_heads, _HEADS), cdiv(num_kv_heads, _HEADS)
        _qk_rope_write_heads[(num_rows, q_parts + 2 * kv_parts)](
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
            *q_strides,
            *k_strides,
            *v_strides,
            angle_row,
            *k_places,
            *v_places,
            HQ=num_heads,
            HK=num_kv_heads,
            Q_PARTS=q_parts,
            KV_PARTS=kv_parts,
            HEADS=_HEADS,
            PAGE=k_pool.shape[2],
            D=head_dim,
            R=cos_sin.shape[1],
            BLOCK=next_power_of_2(cos_sin.shape[1] // 2),
            REST=next_power_of_2(max(1, head_dim - cos_sin.shape[1])),
            BLOCK_D=next_power_of_2(head_dim),
            NORM_Q=q_norm is not None,
            NORM_K=k_norm is not None,
            num_warps=_WARPS,
            **early(q),
        )
    return out


@jit
def _qk_rope_write_heads(
    q, k, v, cos_sin, positions, q_norm, k_norm, eps, out, k_pool, v_pool, pages,
    q_row, q_head, k_row, k_head, v_row, v_head, angle_row, k_page, k_page_head, k_offset, v_page, v_page_head, v_offset,
    HQ: tl.constexpr, HK: tl.constexpr, Q_PARTS: tl.constexpr, KV_PARTS: tl.constexpr, HEADS: tl.constexpr,
    PAGE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, BLOCK_D: tl.constexpr,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_earlier(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    nth = tl.arange(0, HEADS)
    if part < Q_PARTS:
        head = part * HEADS + nth
        angles = cos_sin + tl.load(positions + row) * angle_row
        _turn(q + row * q_row + head * q_head, out + (row * HQ + head) * D, head < HQ, q_norm, angles, eps, D, R, BLOCK, REST, NORM_Q)
    elif part < Q_PARTS + KV_PARTS:
        head = (part - Q_PARTS) * HEADS + nth
        place = tl.load(pages + row)
        angles = cos_sin + tl.load(positions + row) * angle_row
        target = k_pool + place // PAGE * k_page + head * k_page_head + place % PAGE * k_offset
        _turn(k + row * k_row + head * k_head, target, head < HK, k_norm, angles, eps, D, R, BLOCK, REST, NORM_K)
    else:
        head = (part - Q_PARTS - KV_PARTS) * HEADS + nth
        place = tl.load(pages + row)
        column = tl.arange(0, BLOCK_D)
        inside = (head < HK)[:, None] & (column < D)[None, :]
        value = tl.load((v + row * v_row + head * v_head)[:, None] + column[None, :], mask=inside)
        target = v_pool + place // PAGE * v_page + head * v_page_head + place % PAGE * v_offset
        tl.store(target[:, None] + column[None, :], value, mask=inside)


@triton.jit
def _turn(
    source, target, known, weight, angles, eps,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Heads at pointers [HEADS]: optional norm, rotation of the first R numbers, store. Their halves stay apart, since the
    rotation pairs them, and so does the rest."""
    low, rest = tl.arange(0, BLOCK), tl.arange(0, REST)
    half, resting = low < R // 2, rest < D - R
    inside, beside = known[:, None] & half[None, :], known[:, None] & resting[None, :]
    source_rest, target_rest = source[:, None] + R + rest[None, :], target[:, None] + R + rest[None, :]
    source, target = source[:, None] + low[None, :], target[:, None] + low[None, :]
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + R // 2, mask=inside, other=0.0).to(tl.float32)
    kind = target.dtype.element_ty
    c = tl.load(source_rest, mask=beside, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1) + tl.sum(c * c, axis=1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        a = _scaled(a * scale, weight + low, half, kind)
        b = _scaled(b * scale, weight + R // 2 + low, half, kind)
        c = _scaled(c * scale, weight + R + rest, resting, kind)
    cos = tl.load(angles + low, mask=half, other=0.0)[None, :]
    sin = tl.load(angles + R // 2 + low, mask=half, other=0.0)[None, :]
    tl.store(target, (a * cos - b * sin).to(kind), mask=inside)
    tl.store(target + R // 2, (b * cos + a * sin).to(kind), mask=inside)
    tl.store(target_rest, c.to(kind), mask=beside)


@triton.jit
def _scaled(normed, weight, real, kind: tl.constexpr):
    """Times the weights at pointers, rounded as rms_norm rounds."""
    scale = tl.load(weight, mask=real, other=0.0)
    return (normed.to(scale.dtype).to(tl.float32) * scale.to(tl.float32)[None, :]).to(kind).to(tl.float32)
