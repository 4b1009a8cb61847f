"""Drafter: drives the head that drafts, behind the last stage's steps. How many tokens are drafted, and which of them stand, the
front decides; here it is worked out again, on the device, to know where a sequence's drafts begin.

The head passes over every row of every step, so that its keys and values are whole. Where a step asks for drafts, a chain
begins at each sampled item's last row that stands, and has a row more for each further draft:

    rows of an item      5  6  7     a token and two drafts of before
    sampled              6  9  .     6 stands, 7 does not: the item has got 6 and 9
    head's pass          6  9  .     each row with its next token; what the row of 7 keeps is written over later
    first draft             d        from the row of 6, with 9
    chain                      d e   a row with d where the row of 7 was, then one with e: the second draft, the third

The host knows no place in this, or it would have to wait for the device. So places are computed there. Attention, whose lengths
the host plans, is planned for as many queries as an item has sampled rows, all of them the chain's one query: each sees the keys
that there are if its row is the last that stands, and of that one the result is taken. Beyond an item's last page its chain has a
spare one, so that the front has no pages to keep ready.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from trireme.core.batch import Attend, Batch
from trireme.core.step import PAGE, Regime, Step, array
from trireme.models.decoder import Decoder
from trireme.models.mtp import MtpHead
from trireme.parallel.deal import Deal
from trireme.parallel.vocabulary import CutLogits
from trireme.ranks.rows import Rows
from trireme.ranks.staging import upload


class _Standing(NamedTuple):
    """Of I items that sample, their last rows that stand."""

    queries: np.ndarray  # int32 [I]: sampled rows, of which one stands
    owners: torch.Tensor  # int64 [sum of queries]: the item of each
    sampled: torch.Tensor  # int64 [I]: which of all sampled rows stands
    rows: torch.Tensor  # int64 [I]: which of the step's
    positions: torch.Tensor  # int64 [I]


class Drafter:
    """`caches` of the stage, the head's with `max_num_seqs` pages to spare from `first_spare` on; `table` int32 [max_num_seqs,
    pages of a sequence], which the runner keeps."""

    def __init__(self, decoder: Decoder, head: MtpHead, caches: Sequence[tuple[torch.Tensor, ...]], first_spare: int, table: np.ndarray):
        build = decoder.build
        self._decoder, self._head, self._caches, self._first_spare, self._table = decoder, head, caches, first_spare, table
        self._build, self._device, self._last_position = build, build.device, build.spec.max_position_embeddings - 1
        self._along = build.collectives.along("tp")

    def draft(
        self, step: Step, rows: Rows, deal: Deal, batch: Batch, normed: torch.Tensor, sampled: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The head's pass over a step, and if it asks for drafts, int32 [items that sample, Step.drafts]. `normed` [T, H]: the
        decoder's rows; `sampled` int64 [S]: tokens of the rows that are sampled."""
        batch = replace(batch, tokens=self._nexts(step, rows, deal, sampled), routed=None)
        if not step.drafts or sampled is None:
            self._head.keep(normed, batch, deal)
            return None
        passed = self._head(normed, batch, deal)
        standing = self._find(rows, sampled)
        return self._chain(rows, standing, passed.index_select(0, standing.rows), step.drafts).to(torch.int32)

    def _nexts(self, step: Step, rows: Rows, deal: Deal, sampled: torch.Tensor | None) -> torch.Tensor:
        """The token after each of this rank's rows, int64 [N]. Of a draft that does not stand it is any."""
        nexts = np.append(rows.tokens[1:], 0)
        nexts[rows.firsts + rows.counts - 1] = array(step.nexts)
        there, at, own = upload([nexts, rows.sampled, deal.own()], self._device)
        if sampled is not None:
            there[at] = sampled
        return there[own] if deal.regime.cp else there

    def _find(self, rows: Rows, sampled: torch.Tensor) -> _Standing:
        """core.step.accepted of each item, on the device."""
        items = np.flatnonzero(rows.samples)
        queries = rows.samples[items]
        begins = np.cumsum(queries, dtype=np.int64) - queries  # among sampled rows
        place = np.arange(queries.max() - 1)
        compared = place < queries[:, None] - 1  # a token and the draft in the next row
        tokens = rows.tokens[rows.sampled]
        drafts = np.where(compared, tokens[np.minimum(begins[:, None] + place + 1, len(tokens) - 1)], -1)
        owners, begins, at, drafts, firsts, positions = upload(
            [
                np.repeat(np.arange(len(items)), queries),
                begins,
                np.where(compared, begins[:, None] + place, 0),
                drafts,
                rows.sampled[begins],
                rows.positions[rows.sampled[begins]],
            ],
            self._device,
        )
        accepted = (sampled[at] == drafts).long().cumprod(dim=1).sum(dim=1)
        return _Standing(queries, owners, begins + accepted, firsts + accepted, positions + accepted)

    def _chain(self, rows: Rows, standing: _Standing, passed: torch.Tensor, num_drafts: int) -> torch.Tensor:
        """int64 [I, num_drafts], from the head's rows that stand [I, H]. Its rows are few: no rank has a part of them."""
        items = np.flatnonzero(rows.samples)
        slots, ends = rows.slots[items], rows.ends[items]
        table = self.spare_table(slots, ends)
        [pages] = upload([table.astype(np.int64)], self._device)
        deal = Deal(self._build.plan, self._build.rank, np.ones(len(items), np.int32), Regime(), self._device)
        drafts = [self.best(passed)]
        for ahead in range(1, num_drafts):
            at = standing.positions + ahead
            batch = Batch(
                tokens=drafts[-1],
                positions=at.clamp(max=self._last_position),
                pages=pages.gather(1, at[:, None] // PAGE)[:, 0] * PAGE + at % PAGE,
                attention=self._plan_attention(standing, ends + ahead, table),
                shared=None,
                caches=self._caches,
            )
            passed = self._head(passed, batch, deal)
            drafts.append(self.best(passed))
        return torch.stack(drafts, dim=1)

    def spare_table(self, slots: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Page tables int32 [I, P] of items that end at `ends`, each with its slot's spare page behind its last one."""
        num_pages = -(-ends // PAGE)
        table = np.zeros((len(slots), int(num_pages.max()) + 1), np.int32)
        table[:, :-1] = self._table[slots, : table.shape[1] - 1]
        table[np.arange(len(slots)), num_pages] = self._first_spare + slots
        return table

    def _plan_attention(self, standing: _Standing, ends: np.ndarray, table: np.ndarray) -> Mapping[int, Attend]:
        """Of one query an item, the row that stands decides which keys it sees."""
        planned = self._decoder.plan_attention(standing.queries, ends.astype(np.int32), table)
        if len(standing.owners) == len(standing.queries):
            return planned
        return {window: partial(_attend_as_the_standing, attend, standing) for window, attend in planned.items()}

    def best(self, rows: torch.Tensor) -> torch.Tensor:
        """Of the head's rows [R, H] the highest tokens, int64 [R]."""
        return CutLogits(self._head.logits(rows), self._build.spec.vocab_size, self._along).argmax()


def _attend_as_the_standing(attend: Attend, standing: _Standing, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return attend(q[standing.owners], keys, values)[standing.sampled]
