"""Rehearsal: groups that speak to nobody, so that a rank can measure a step before it meets the others. Only shapes are right."""

from __future__ import annotations

import torch

from trireme.parallel.collectives import Collectives
from trireme.parallel.mail import Mail


class Rehearsed:
    """A Group of one place among others that are not there."""

    def __init__(self, place: int):
        self._place = place

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return x.new_zeros(sum(counts), *x.shape[1:])

    def reduce_scatter(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return x.new_zeros(counts[self._place], *x.shape[1:])

    def all_to_all(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """As if every place sent what this one sends, so that experts to whom rows are dispatched have some to compute."""
        if not len(x):
            return x.new_zeros(sum(received), *x.shape[1:])
        return x.index_select(0, torch.arange(sum(received), device=x.device) % len(x))

    def close(self) -> None:
        pass


def rehearse(collectives: Collectives) -> None:
    """Fill every span of an epoch that is not one; `leave` ends it."""
    groups = {span: Rehearsed(span.place(collectives.rank)) for span in collectives.spans}
    collectives.begin(groups, mail=None if collectives.mailbox is None else Mail(collectives.mailbox))
