"""Pieces: steps with prompts, captured from one attention to the next. They too may cost a GPU less time than Python needs to launch them,
but what attention and steps of states launch depends on how long sequences are, so that it stands between replays:

    replay | attention of layer 0 | replay | attention of layer 1 | replay ... | rows whose logits are asked for

A step of 64 rows of Qwen3-8B is 6.8 ms of an H100 and 28 of its host, kernel by kernel; in pieces 7 of the host.

One set of pieces for each bucket of rows, as graphs.py has graphs: rows of nobody fill it up. What follows of the last layers is of
other rows at each step, and is launched kernel by kernel.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from trireme.core.batch import Batch, Items
from trireme.core.settings import Settings
from trireme.core.step import Regime
from trireme.models.decoder import Computed, Decoder, Passed
from trireme.parallel.deal import Deal
from trireme.ranks.graphs import Fill, Numbers, Record, Recording, borrowed
from trireme.ranks.regimes import measures_sp
from trireme.ranks.rows import Rows

_BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024)  # rows; with more of them a GPU has more to do than Python


def piece_sizes(settings: Settings, device: torch.device) -> list[int]:
    """Rows of what is captured, where there are graphs at all, most first: of all steps that may be without sequence parallelism."""
    most = settings.max_num_batched_tokens
    if settings.sp_from is not None and not measures_sp(settings, device):
        most = min(most, settings.sp_from - 1)
    return [size for below, size in zip((0, *_BUCKETS), _BUCKETS, strict=False) if below < most][::-1]


class Pieces:
    """Steps of a stage of which every rank has all rows."""

    def __init__(
        self, decoder: Decoder, caches: Sequence[tuple[torch.Tensor, ...]], sizes: Iterable[int], *, fill: Fill, scratch_page: int
    ):
        self._handed_on: dict[tuple[torch.dtype, tuple[int, ...]], torch.Tensor] = {}
        self._all = [InPieces(decoder, caches, size, fill, scratch_page, self._place_like) for size in sizes]
        self._sizes = [each.num_rows for each in reversed(self._all)]
        self._most, self._told = max(self._sizes), "not captured"

    def __str__(self) -> str:
        return f"pieces of steps of up to {self._most} rows, {self._told}"

    def warm(self) -> None:
        """Once before any capture: kernels are compiled."""
        for each in self._all:
            each.compute(lambda: None)
            each.drop()

    def capture(self, record: Record) -> None:
        """Every rank of a stage calls it, or none."""
        began = time.perf_counter()
        try:
            for each in self._all:
                each.capture(record)
        except BaseException:
            self.drop()
            raise
        self._told = f"captured in {time.perf_counter() - began:.1f} s"

    def drop(self) -> None:
        """Before the groups that they hold are closed."""
        for each in self._all:
            each.drop()

    def find(self, rows: Rows, regime: Regime) -> InPieces | None:
        """The least that computes these rows; None where none does."""
        at = bisect_left(self._sizes, len(rows.tokens))
        if regime != Regime() or at == len(self._sizes):
            return None
        found = self._all[-1 - at]
        return found if found.is_captured else None

    def _place_like(self, x: torch.Tensor) -> torch.Tensor:
        """Where what stands between pieces leaves its result for the next one, whatever the layer: of the shape and dtype of x [N, ...].
        Of rows that are nobody's it is any."""
        num_rows, *sizes = x.shape
        key = (x.dtype, tuple(sizes))
        if key not in self._handed_on:
            self._handed_on[key] = torch.zeros(self._most, *sizes, dtype=x.dtype, device=x.device)
        return self._handed_on[key][:num_rows]


Gap = Callable[[Batch, int], None]
"""What stands between two pieces, of a batch and its number of rows."""


class InPieces:
    """Steps of up to so many rows."""

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[tuple[torch.Tensor, ...]],
        num_rows: int,
        fill: Fill,
        scratch_page: int,
        place_like: Callable[[torch.Tensor], torch.Tensor],
    ):
        build = decoder.build
        self.num_rows = num_rows
        self._decoder, self._caches, self._fill, self._place_like = decoder, caches, fill, place_like
        self._deal = Deal(build.plan, build.rank, np.array([num_rows], np.int32), Regime(), build.device)
        self._numbers = Numbers(num_rows, scratch_page, build.device)
        self._edge = None if build.first else torch.zeros(num_rows, build.spec.hidden, dtype=build.dtype, device=build.device)
        none, [one] = torch.zeros(1, dtype=torch.int64, device=build.device), np.ones((1, 1), np.int32)
        # what is captured does not read it
        self._items = partial(Items, slots=none, fresh=none > 0, counts=num_rows * one, replays=0 * one, holds=one < 0)
        self._recordings: Sequence[Recording] = []
        self._gaps: list[Gap] = []
        self._passed: Passed | None = None

    @property
    def is_captured(self) -> bool:
        return bool(self._recordings)

    def compute(self, cut: Callable[[], None]) -> None:
        """The launches of a step as far as all rows go, but for those of attention and of states, where it is `cut`."""
        self._gaps, self._passed = [], None
        numbers, decoder = self._numbers, self._decoder
        batch = Batch(
            tokens=self._fill(numbers.tokens, numbers.slots) if decoder.build.first else numbers.tokens,
            positions=numbers.positions,
            pages=numbers.pages,
            attention={window: partial(self._leave_attention, cut, window) for window in decoder.windows},
            shared=None,
            caches=self._caches,
            items=self._items(plans={step: partial(self._leave_states, cut, step) for step in decoder.steps}),
            num_rows=numbers.num_real,
        )
        x, residual = decoder.begin(batch, self._deal, self._edge)
        self._passed = Passed(None if x is None else [borrowed(rows) for rows in x], [borrowed(rows) for rows in residual])

    def _leave_attention(
        self, cut: Callable[[], None], window: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """As Attend."""
        lent, place = borrowed(queries), self._place_like(queries)

        def attend(batch: Batch, num_rows: int) -> None:
            batch.attention[window](lent[:num_rows], keys, values, out=place[:num_rows])

        self._gaps.append(attend)
        cut()
        return place

    def _leave_states(self, cut: Callable[[], None], step: object, *arguments: Any) -> torch.Tensor:
        """As an Advance."""
        *rows, gate = arguments[:4]
        lent, place, fixed = [borrowed(x) for x in (*rows, gate)], self._place_like(gate), arguments[4:-2]

        def advance(batch: Batch, num_rows: int) -> None:
            items = batch.items
            assert items is not None, "a step says which items its states are of"
            place[:num_rows] = items.plans[step](*(x[:num_rows] for x in lent), *fixed, items.slots, items.fresh)

        self._gaps.append(advance)
        cut()
        return place

    def capture(self, record: Record) -> None:
        self._recordings = record.in_pieces(self.compute)

    def drop(self) -> None:
        for recording in self._recordings:
            recording.reset()
        self._recordings, self._gaps, self._passed = [], [], None

    def run(self, rows: Rows, batch: Batch, deal: Deal, received: torch.Tensor | None) -> Computed:
        """What the decoder's forward gives for rows that `find` gave this for."""
        num_rows = len(rows.tokens)
        self._numbers.take(rows, np.arange(num_rows))
        if self._edge is not None and received is not None:
            self._edge[:num_rows] = received
        if batch.items is not None:
            self._decoder.plan_states(batch.items)
        for number, recording in enumerate(self._recordings):
            recording.replay()
            if number < len(self._recordings) - 1:
                self._gaps[number](batch, num_rows)
        assert self._passed is not None
        x, residual = self._passed
        real = Passed(None if x is None else [each[:num_rows] for each in x], [each[:num_rows] for each in residual])
        return self._decoder.finish(real, batch, deal)
