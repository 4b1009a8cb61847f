"""Routed rows: which experts the rows of a step were given, as one rank tells it. Whose rows are asked for the front says; rows of
several ranks are put together by their leader."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from trireme.core.step import Step, array
from trireme.models.decoder import Decoder
from trireme.parallel.deal import Deal
from trireme.parallel.layout import cut_of, home_of
from trireme.ranks.rows import Rows
from trireme.ranks.staging import download, upload


def asked_rows(step: Step, rows: Rows) -> np.ndarray:
    """int64: the rows of the items whose users ask for their experts."""
    return np.flatnonzero(np.isin(np.repeat(np.arange(len(rows.counts)), rows.counts), array(step.routed)))


def tell_routed(decoder: Decoder, deal: Deal, asked: np.ndarray, routed: Sequence[torch.Tensor]) -> Callable[[], bytes]:
    """What is returned makes the experts of the rows `asked` as this rank tells them in an Outcome, once the device has come so far.
    `routed`: int16 [rows that this rank routes, experts of a row] of each layer with experts. Of ranks that route the same rows the
    first tells them."""
    if not routed or not len(asked):
        return bytes
    build = decoder.build
    cut = cut_of(decoder.mixtures[0].takes.at(home_of(deal.regime)), build.collectives.mesh)
    if any(all(span.place(before) == span.place(build.rank) for span in cut) for before in range(build.rank)):
        return bytes
    places = np.full(deal.num_rows, -1)
    mine = deal.rows(cut)
    places[mine] = np.arange(len(mine))
    here = places[asked] >= 0
    [at] = upload([places[asked][here]], build.device)
    experts = download(torch.stack([layer.index_select(0, at) for layer in routed], dim=1))  # [here, layers, k]

    def read() -> bytes:
        told = np.full((len(asked), *experts.shape[1:]), -1, np.int16)
        told[here] = experts.numpy()
        return told.tobytes()

    return read
