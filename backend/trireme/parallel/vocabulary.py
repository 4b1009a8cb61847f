"""CutLogits: logits whose columns are cut over ranks, and what can be asked of whole rows at little traffic. How a token is
drawn is ranks/sampler's."""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from trireme.parallel.collectives import Along


class CutLogits:
    """A rank's columns `local` float32 [n, width] of n rows; the ranks `along` have all `vocab_size` of them, equal runs in
    the order of places. What the last ones lack is -inf, which wins nothing and counts for nothing.

    All ranks ask the same questions in the same order. Each makes the answer from the same gathered numbers in the same way,
    so it has the same bits on all: all ranks can sample alike, and no token need be broadcast. Alone, a rank copies nothing.
    """

    def __init__(self, local: Tensor, vocab_size: int, along: Along):
        self.vocab_size, self.along = vocab_size, along
        self.width = ceil(vocab_size / along.size)
        lacking = self.width - local.shape[1]
        self.local = F.pad(local, (0, lacking), value=-torch.inf) if lacking else local
        self.first = along.place * self.width  # token of the first column

    def __len__(self) -> int:
        return len(self.local)

    @property
    def ids(self) -> Tensor:
        """Tokens of the columns, int64 [1, width]."""
        return torch.arange(self.first, self.first + self.width, device=self.local.device)[None]

    def select(self, rows: slice | Tensor) -> CutLogits:
        """Some of the rows: a view of a slice, a copy of numbered ones."""
        return CutLogits(self.local[rows], self.vocab_size, self.along)

    def argmax(self) -> Tensor:
        """The highest token of each row, int64 [n]; of equals the lowest, as torch.argmax has it."""
        values, columns = self.local.max(dim=-1)
        return self.best(values, columns + self.first)

    def best(self, scores: Tensor, ids: Tensor) -> Tensor:
        """Of what each rank found best, float32 [n] and int64 [n], the tokens of the highest scores, of equals the lowest: int64 [n]."""
        return self.along.best(scores, ids)[1]

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k highest of each row, highest first and of equals the lower token: (values [n, k], ids int64 [n, k])."""
        values, columns = highest(self.local, min(k, self.width))
        ids = columns + self.first
        if self.along.size == 1:
            return values, ids
        num = values.shape[1]
        together = self._everyone(torch.cat([values.view(torch.int32), ids.to(torch.int32)], dim=1))  # one message
        values, ids = (self._beside(part) for part in (together[..., :num], together[..., num:]))
        values, order = values.view(torch.float32).sort(dim=-1, descending=True, stable=True)  # places have rising ids
        return values[:, :k], ids.gather(1, order[:, :k]).long()

    def highest(self, k: int) -> Tensor:
        """The k highest of each row, highest first: [n, k]. Asks nothing of ids, so equals need no order."""
        values = self.local.topk(min(k, self.width), dim=-1).values
        return values if self.along.size == 1 else self._beside(self._everyone(values)).topk(k, dim=-1).values

    def full(self) -> Tensor:
        """Whole rows [n, vocab_size]; alone, `local` itself."""
        if self.along.size == 1:
            return self.local
        return self._beside(self._everyone(self.local))[:, : self.vocab_size]

    def at(self, tokens: Tensor) -> Tensor:
        """The logit of one token of each row: int64 [n] -> [n]."""
        columns = (tokens - self.first).clamp(0, self.width - 1)
        found = self._everyone(self.local.gather(1, columns[:, None]))[..., 0]
        return found.gather(0, (tokens // self.width)[None])[0]  # as the rank says that has it

    def logsumexp(self) -> Tensor:
        """Of whole rows, [n]."""
        return self._everyone(self.local.logsumexp(dim=-1, keepdim=True)).logsumexp(dim=0)[:, 0]

    def num_above(self, values: Tensor) -> Tensor:
        """How many logits of each row are above a value [n] of its own: int64 [n]."""
        return self._everyone((self.local > values[:, None]).sum(dim=-1, keepdim=True)).sum(dim=0)[:, 0]

    def _everyone(self, x: Tensor) -> Tensor:
        """Every rank's [n, c], by place: [size, n, c]."""
        size = self.along.size
        everyone = self.along.all_gather(x, [len(x)] * size) if x.numel() else x.new_empty((size * len(x), x.shape[1]))
        return everyone.view(size, *x.shape)

    def _beside(self, everyone: Tensor) -> Tensor:
        """[size, n, c] -> [n, size * c], in the order of places."""
        size, num_rows, num = everyone.shape
        return everyone.transpose(0, 1).reshape(num_rows, size * num)


def highest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [n, c] -> the k <= c highest of each row, highest first and of equals the lower column: (values, columns) [n, k].
    torch.topk leaves open which of equals it takes, and in what order."""
    if not k:
        return x[:, :0], x[:, :0].long()
    values, columns = x.topk(min(k + 1, x.shape[1]), dim=-1)  # one more shows whether equals of the last were left out
    if k < x.shape[1]:
        split = (values[:, k] == values[:, k - 1]).nonzero()[:, 0]
        columns[split, :k] = _with_lowest(x[split], values[split, :k], columns[split, :k])
    columns = columns[:, :k].sort(dim=-1).values  # so that the stable sort puts the lower of equals first
    values, order = x.gather(1, columns).sort(dim=-1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _with_lowest(x: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    """The columns [n, k] that topk of x [n, c] found, those of its last value replaced by the lowest that have it."""
    last = values[:, -1:]
    everything = torch.arange(x.shape[1], device=x.device)
    lowest = torch.where(x == last, everything, x.shape[1]).topk(values.shape[1], largest=False).values
    place = torch.arange(values.shape[1], device=x.device) - (values > last).sum(dim=-1, keepdim=True)
    return torch.where(place < 0, columns, lowest.gather(1, place.clamp(min=0)))
