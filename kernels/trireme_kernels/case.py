"""Case: what an implementation may ask before it says that it fits. Work: the least that it must do. No choice is made here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Case:
    """Where and on what an op will run; each op's op.py names the `sizes` it knows."""

    device: str  # "cpu" | "cuda"
    dtype: torch.dtype  # of activations and caches
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = "".join(f" {name}={size}" for name, size in self.sizes.items())
        return f"{self.device} {str(self.dtype).removeprefix('torch.')}{sizes}"


class Work(NamedTuple):
    """The least that an op does on its inputs, whatever the implementation: each input read once, each result written once."""

    moved_bytes: int
    flops: int = 0  # of matrix products
