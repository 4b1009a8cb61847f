"""Rotary positions: the table of cosines and sines, by the checkpoint's scaling. The turning itself is an op."""

from __future__ import annotations

import math

import torch

from trireme.models.spec import Rope


def cos_sin(rope: Rope, rotary_dim: int, length: int) -> torch.Tensor:
    """float32 [length, rotary_dim]: for each position the cosines of rotary_dim/2 angles, then their sines. rotary_dim: the numbers
    of a head that turn."""
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies(rope, rotary_dim)[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=1) * rope.attention_factor


def frequencies(rope: Rope, rotary_dim: int) -> torch.Tensor:
    """Radians a position, float32 [rotary_dim / 2], fastest first."""
    plain = 1.0 / rope.theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, rotary_dim, plain)
    return plain


def _llama3(rope: Rope, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: waves longer than the pretrained context are stretched, short ones kept, those between are blended."""
    turns = rope.original_max_position * plain / (2 * math.pi)  # in the pretrained context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return _blend(plain / rope.factor, plain, kept.clamp(0, 1))


def _yarn(rope: Rope, rotary_dim: int, plain: torch.Tensor) -> torch.Tensor:
    """Peng et al. 2023, 3.2: as llama3, but the blend runs linearly over the dims between two numbers of turns."""

    def dim_of(turns: float) -> float:
        return rotary_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    stretched = (torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    return _blend(plain / rope.factor, plain, 1 - stretched.clamp(0, 1))


def _blend(stretched: torch.Tensor, kept: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return (1 - share) * stretched + share * kept
