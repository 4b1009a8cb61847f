"""qk_rope_write in PyTorch; its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.qk_rope_write.op import QkRopeWrite
from trireme_kernels.rms_norm.reference import rms_norm


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
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    if k.shape[1]:
        size = k_pool.shape[2]
        page, offset = pages // size, pages % size
        # [pages, PAGE, Hk, D] views: an indexed write lands in the pool whatever its strides are.
        k_pool.transpose(1, 2).index_put_((page, offset), _turn(k, cos, sin))
        v_pool.transpose(1, 2).index_put_((page, offset), v)
    return _turn(q, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [T, H, D], [T, 1, R] twice -> [T, H, D]
    """Rotation of pairs (i, i + R/2); a roll by R/2 pairs every element with its partner (`sin` carries the sign)."""
    rotary_dim = cos.shape[-1]
    wide = x[..., :rotary_dim].float()
    turned = (wide * cos).addcmul_(wide.roll(rotary_dim // 2, dims=-1), sin).to(x.dtype)
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), dim=-1)
