"""Rows: a Step laid out row by row, with the page tables of its slots. Numpy only; the runner makes tensors of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trireme.core.step import FED, PAGE, Step, array


@dataclass(frozen=True)
class Rows:
    """T rows of I items, item after item."""

    slots: np.ndarray  # int32 [I]
    starts: np.ndarray  # int32 [I]: position of an item's first row
    counts: np.ndarray  # int32 [I]
    firsts: np.ndarray  # int64 [I]: an item's first row
    samples: np.ndarray  # int32 [I]: how many of an item's last rows are sampled
    sampled: np.ndarray  # int64 [S]: the rows that are sampled, in order
    replays: np.ndarray  # int32 [I]: rows held before that an item's states take first
    holds: np.ndarray  # bool [I]: whether an item's rows are held
    owners: np.ndarray  # int32 [T]: a row's slot
    tokens: np.ndarray  # int64 [T]: FED where the token is not in the Step
    positions: np.ndarray  # int64 [T]
    pages: np.ndarray  # int64 [T]: page * PAGE + offset

    @property
    def fed(self) -> np.ndarray:  # bool [T]
        return self.tokens == FED

    @property
    def ends(self) -> np.ndarray:  # int32 [I]: position after an item's last row = keys it sees
        return self.starts + self.counts

    @property
    def feeds(self) -> np.ndarray:
        """bool [S]: whether a sampled row's token may be FED later. Of an item with drafts that is known to the front alone, once
        it has compared them."""
        return np.repeat(self.samples, self.samples) == 1


def lay_out(step: Step, page_table: np.ndarray) -> Rows:
    """Rows of a step. `page_table`: int32 [max_num_seqs, pages of a sequence], with the step's own writes in it."""
    slots, starts, counts = array(step.slots), array(step.starts), array(step.counts)
    firsts = np.cumsum(counts, dtype=np.int64) - counts
    positions = np.arange(step.num_rows) + np.repeat(starts - firsts, counts)
    owners = np.repeat(slots, counts)
    samples = array(step.samples)
    pages = page_table[owners, positions // PAGE].astype(np.int64)
    return Rows(
        slots=slots,
        starts=starts,
        counts=counts,
        firsts=firsts,
        samples=samples,
        sampled=np.flatnonzero(np.arange(step.num_rows) >= np.repeat(firsts + counts - samples, counts)),
        replays=array(step.replays) if step.replays else np.zeros_like(slots),
        holds=array(step.holds).astype(bool) if step.holds else np.zeros(len(slots), bool),
        owners=owners,
        tokens=array(step.tokens).astype(np.int64),
        positions=positions,
        pages=pages * PAGE + positions % PAGE,
    )
