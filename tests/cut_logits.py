"""Logits whose columns are cut over ranks in threads of this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from threads import Boards, on_every_rank
from trireme.parallel.collectives import Collectives
from trireme.parallel.mesh import Mesh
from trireme.parallel.plan import Plan
from trireme.parallel.vocabulary import CutLogits

T = TypeVar("T")


def uncut(logits: torch.Tensor) -> CutLogits:
    """As the only rank has them."""
    return CutLogits(logits, logits.shape[1], Collectives(Mesh(Plan(layer_cut=(1,))), 0).along("tp"))


def on_cut(logits: torch.Tensor, num_ranks: int, ask: Callable[[CutLogits], T]) -> list[T]:
    """What each of `num_ranks` answers that have equal runs of the columns, the last ones fewer or none."""
    boards, mesh = Boards(), Mesh(Plan(layer_cut=(1,), tp=num_ranks))
    vocab = logits.shape[1]
    width = -(-vocab // num_ranks)

    def answer(rank: int) -> T:
        collectives = Collectives(mesh, rank)
        along = collectives.along("tp")
        collectives.begin(boards.groups(collectives))
        return ask(CutLogits(logits[:, min(rank * width, vocab) : min((rank + 1) * width, vocab)], vocab, along))

    return on_every_rank(num_ranks, answer, boards)
