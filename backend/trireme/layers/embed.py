"""The two ends of a decoder: Embed turns tokens into the first residual, Head turns rows into logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from trireme.core.batch import Batch
from trireme.layers.block import Block, Build
from trireme.layers.linear import Linear
from trireme.layers.param import Param, norm_weight, vocabulary
from trireme.parallel.layout import SUM, WHOLE, lay
from trireme.parallel.strips import Strips


class Embed(nn.Module):
    """tokens [N] -> rows [N, H]; no norm and no residual stand before it, so it is not a Block."""

    gives = lay(tp=SUM)  # a rank knows only its part of the vocabulary

    def __init__(self, build: Build, name: str = "embed", tied: Param | None = None):
        super().__init__()
        spec = build.spec
        self.name = name
        cut = vocabulary("tp", spec.vocab_size)
        self.weight = Param(build, (spec.vocab_size, spec.hidden), cut) if tied is None else tied
        self._own = cut.parts[0].share(*build.place("tp"))  # tokens
        self._has_all = len(self._own) == spec.vocab_size

    def forward(self, batch: Batch) -> torch.Tensor:
        if self._has_all:
            return F.embedding(batch.tokens, self.weight)
        if not len(self._own):  # the vocabulary is dealt out before this rank's turn
            return self.weight.new_zeros((len(batch.tokens), self.weight.shape[1]))
        mine = (batch.tokens >= self._own.start) & (batch.tokens < self._own.stop)
        rows = F.embedding((batch.tokens - self._own.start).clamp(0, len(self._own) - 1), self.weight)
        return rows.masked_fill_(~mine[:, None], 0)


class Head(Block):
    """Rows [T, H] -> float32 logits of those that are sampled, a rank's columns of them: [R, its part of V], to be asked through
    parallel/vocabulary. `tied` is the embedding where this stage has it too."""

    takes = lay(tp=WHOLE, cp=WHOLE)  # a row's columns are on all ranks, and so is the row

    def __init__(self, build: Build, tied: Param | None):
        super().__init__("head")
        spec = build.spec
        self.norm = norm_weight(build, spec.hidden)
        self.proj = Linear(build, spec.vocab_size, spec.hidden, vocabulary("tp", spec.vocab_size), tied=tied)
        self._num_logits = self.proj.weight.shape[0]

    def forward(self, x: Strips, batch: Batch) -> Sequence[torch.Tensor]:
        return [self.logits(x.going(x.whole())[: batch.num_sampled])]

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Of normed rows [R, H]."""
        if len(rows) == 0:  # a prefill chunk that asks nothing must not read the whole head
            return rows.new_empty((0, self._num_logits), dtype=torch.float32)
        return self.proj(rows, torch.float32)
