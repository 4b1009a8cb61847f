"""Pieces: steps with prompts, captured from one attention to the next. They too may cost a GPU less time than Python needs to launch them,
but what attention launches depends on how long sequences are, so that it stands between replays:

    replay | attention of layer 0 | replay | attention of layer 1 | replay ... | rows whose logits are asked for

One set of pieces for each bucket of rows, as graphs.py has graphs: rows of nobody fill it up. What follows of the last layers is of
other rows at each step, and is launched kernel by kernel.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from trireme.core.batch import Batch
from trireme.core.settings import Settings
from trireme.core.step import Regime
from trireme.layers.block import PerToken
from trireme.models.decoder import Computed, Decoder, Passed
from trireme.parallel.deal import Deal
from trireme.ranks.graphs import Fill, Numbers, Record, Recording, borrowed
from trireme.ranks.rows import Rows

_BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024)  # rows; with more of them a GPU has more to do than Python


def piece_sizes(settings: Settings, decoder: Decoder) -> list[int]:
    """Rows of what is captured, where there are graphs at all, most first; none where layers keep states, whose launches depend on how
    long sequences are, too."""
    if not all(isinstance(keep, PerToken) for keep in decoder.keeps) or not decoder.has_whole_edges(Regime()):
        return []
    most = settings.max_num_batched_tokens
    return [size for below, size in reversed(list(zip((0, *_BUCKETS), _BUCKETS, strict=False))) if below < most]


class Pieces:
    """Steps of a stage of which every rank has all rows."""

    def __init__(
        self, decoder: Decoder, caches: Sequence[tuple[torch.Tensor, ...]], sizes: Iterable[int], *, fill: Fill, scratch_page: int
    ):
        self._attended: dict[tuple[int, ...], torch.Tensor] = {}
        self._all = [InPieces(decoder, caches, size, fill, scratch_page, self._attended_rows) for size in sizes]
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

    def _attended_rows(self, like: torch.Tensor) -> torch.Tensor:
        """Where attention of every layer leaves its result for the next replay: [N, Hq, D], `like` the queries. Numbers of rows that are
        nobody's are any."""
        num_rows, *sizes = like.shape
        key = tuple(sizes)
        if key not in self._attended:
            self._attended[key] = torch.zeros(self._most, *sizes, dtype=like.dtype, device=like.device)
        return self._attended[key][:num_rows]


class _Gap(NamedTuple):
    """An attention between two pieces."""

    window: int
    queries: torch.Tensor  # [N, Hq, D]
    pools: tuple[torch.Tensor, torch.Tensor]
    attended: torch.Tensor  # [N, Hq, D]


class InPieces:
    """Steps of up to so many rows."""

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[tuple[torch.Tensor, ...]],
        num_rows: int,
        fill: Fill,
        scratch_page: int,
        attended: Callable[[torch.Tensor], torch.Tensor],
    ):
        build = decoder.build
        self.num_rows = num_rows
        self._decoder, self._caches, self._fill, self._attended = decoder, caches, fill, attended
        self._deal = Deal(build.plan, build.rank, np.array([num_rows], np.int32), Regime(), build.device)
        self._numbers = Numbers(num_rows, scratch_page, build.device)
        self._edge = None if build.first else torch.zeros(num_rows, build.spec.hidden, dtype=build.dtype, device=build.device)
        self._windows = decoder.windows
        self._recordings: Sequence[Recording] = []
        self._gaps: list[_Gap] = []
        self._passed: Passed | None = None

    @property
    def is_captured(self) -> bool:
        return bool(self._recordings)

    def compute(self, cut: Callable[[], None]) -> None:
        """The launches of a step as far as all rows go, without attention, in whose places it is `cut`."""
        self._gaps, self._passed = [], None
        numbers = self._numbers
        batch = Batch(
            tokens=self._fill(numbers.tokens, numbers.slots) if self._decoder.build.first else numbers.tokens,
            positions=numbers.positions,
            pages=numbers.pages,
            attention={window: partial(self._leave_out, cut, window) for window in self._windows},
            shared=None,
            caches=self._caches,
            num_rows=numbers.num_real,
        )
        (x, residual) = self._decoder.begin(batch, self._deal, self._edge)
        self._passed = Passed(None if x is None else [borrowed(rows) for rows in x], [borrowed(rows) for rows in residual])

    def _leave_out(
        self, cut: Callable[[], None], window: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        attended = self._attended(queries)
        self._gaps.append(_Gap(window, borrowed(queries), (keys, values), attended))
        cut()
        return attended

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
        for number, recording in enumerate(self._recordings):
            recording.replay()
            if number < len(self._recordings) - 1:
                window, queries, pools, attended = self._gaps[number]
                batch.attention[window](queries[:num_rows], *pools, out=attended[:num_rows])
        assert self._passed is not None
        (x, residual) = self._passed
        real = Passed(None if x is None else [each[:num_rows] for each in x], [each[:num_rows] for each in residual])
        return self._decoder.finish(real, batch, deal)
