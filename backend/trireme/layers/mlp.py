"""The dense MLP, gated by silu."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trireme.core.batch import Batch
from trireme.layers.block import Block, Build
from trireme.layers.linear import GatedLinear, LastLinear
from trireme.layers.param import by_rows, norm_weight
from trireme.parallel.layout import SUM, lay
from trireme.parallel.seam import Addend
from trireme.parallel.strips import Strips


class GatedMlp(Block):
    """Rows [T, H] -> [T, H]: down(silu(gate) * up), gate and up in one product."""

    takes, gives = lay(), lay(tp=SUM)

    def __init__(self, build: Build, layer: int, *, bias: bool = False):
        super().__init__(f"layers.{layer}.mlp")
        hidden, intermediate = build.spec.hidden, build.spec.intermediate
        self.norm = norm_weight(build, hidden)
        self.gate_up = GatedLinear(build, intermediate, hidden, "tp", bias=bias)
        self.down = LastLinear(build, hidden, intermediate, by_rows("tp", intermediate), bias=bias)

    def forward(self, x: Strips, batch: Batch) -> Iterator[torch.Tensor | Addend]:
        return (self.down.for_seam(self.gate_up(rows)) for rows in x)
