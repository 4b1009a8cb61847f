"""The two ends of a decoder: Embed turns tokens into the first residual, Head turns rows into logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trireme.core.batch import Batch
from trireme.layers.block import Block, Build
from trireme.layers.linear import Linear
from trireme.layers.param import Param, vocabulary
from trireme.parallel.layout import SUM, lay


class Embed(nn.Module):
    """tokens [T] -> rows [T, H]; no norm and no residual stand before it, so it is not a Block."""

    gives = lay(tp=SUM)  # a rank knows only its part of the vocabulary

    def __init__(self, build: Build):
        super().__init__()
        spec = build.spec
        self.name = "embed"
        self.weight = Param(build, (spec.vocab_size, spec.hidden), vocabulary("tp", spec.vocab_size))

    def forward(self, batch: Batch) -> torch.Tensor:
        return F.embedding(batch.tokens, self.weight)


class Head(Block):
    """Rows [T, H] -> float32 logits [R, V] of `batch.head_rows`. `tied` is the embedding where this stage has it too."""

    def __init__(self, build: Build, tied: Param | None):
        super().__init__("head")
        spec = build.spec
        self.norm = Param(build, (spec.hidden,))
        self.proj = Linear(build, spec.vocab_size, spec.hidden, vocabulary("tp", spec.vocab_size), tied=tied)
        self._num_logits = self.proj.weight.shape[0]

    def forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        rows = x.index_select(0, batch.head_rows)
        if len(rows) == 0:  # a prefill chunk that asks nothing must not read the whole head
            return rows.new_empty((0, self._num_logits), dtype=torch.float32)
        return self.proj(rows).float()
