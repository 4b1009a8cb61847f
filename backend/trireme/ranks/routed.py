"""Routed rows: which experts the rows of a step were given, as one rank tells it. Which rows are asked for the front says; rows of
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


def tell_routed(decoder: Decoder, deal: Deal, step: Step, rows: Rows, routed: Sequence[torch.Tensor]) -> Callable[[], bytes]:
    """What is returned makes Outcome.routed_experts of this rank, once the device has come so far. `routed`: int16 [rows that this
    rank routes, experts of a row] of each layer with experts. Of ranks that route the same rows the first tells them."""
    if not routed:
        return bytes
    build = decoder.build
    cut = cut_of(decoder.mixtures[0].takes.at(home_of(deal.regime)), build.collectives.mesh)
    if any(all(span.place(before) == span.place(build.rank) for span in cut) for before in range(build.rank)):
        return bytes
    asked = np.flatnonzero(np.isin(np.repeat(np.arange(len(rows.counts)), rows.counts), array(step.routed)))
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
