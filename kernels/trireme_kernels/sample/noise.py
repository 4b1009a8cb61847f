"""Random numbers of `sample`: a pure function of (seed, position, token), with no generator and no state."""

from __future__ import annotations

import torch
from torch import Tensor

# Constants of splitmix64 (rows), and of the golden ratio and murmur3's finaliser (tokens), as signed integers.
_ROW = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_TOKEN = (-0x61C88647, -0x7A143595, -0x3D4D51CB)


def gumbel(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """seeds, positions int64 [n], tokens int64 [n or 1, k] -> standard Gumbel noise float32 [n, k].

    argmax(logits + noise) is then a draw from softmax(logits) (the Gumbel-max trick). The row's key is mixed in 64 bits,
    tokens in 32, which is half the memory traffic over a vocabulary; integer products wrap, on every device alike.
    """
    key = _mix_row(_mix_row(seeds) ^ positions)
    low, high = key.to(torch.int32)[:, None], (key >> 32).to(torch.int32)[:, None]
    bits = (tokens.to(torch.int32) * _TOKEN[0]) ^ low
    bits = (bits ^ _shifted(bits, 16)).mul_(_TOKEN[1]).add_(high)
    bits = (bits ^ _shifted(bits, 13)).mul_(_TOKEN[2])
    bits = _shifted(bits ^ _shifted(bits, 16), 1)  # 31 bits, so that float32 keeps small numbers exact
    # Winners have a *small* exponential, so the uniform number is precise near 0. It stays below 1: noise is finite.
    uniform = bits.float().add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    exponential = uniform.neg_().log1p_().neg_()
    return exponential.log_().neg_()


def _mix_row(x: Tensor) -> Tensor:  # int64 -> int64
    """One number of splitmix64: every input bit reaches every output bit."""
    x = x + _ROW[0]  # 0 would stay 0
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _ROW[1]
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _ROW[2]
    return x ^ (x >> 31 & (1 << 33) - 1)


def _shifted(x: Tensor, bits: int) -> Tensor:  # int32 -> int32
    """Logical shift to the right; torch's keeps the sign."""
    return (x >> bits).bitwise_and_((1 << 32 - bits) - 1)
