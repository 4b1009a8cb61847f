"""Runners of all stages in this process, and Steps made by hand: chunks, decodes, drafts that may not stand, snapshots. No leader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from threads import Boards, on_every_rank
from trireme.core.request import Sampling
from trireme.core.settings import Settings, make_settings
from trireme.core.step import PAGE, Open, Outcome, Step, ints
from trireme.parallel.link import SoloLink, TensorLink
from trireme.ranks.load import load_runner
from trireme.ranks.runner import Pending, Runner

NUM_SLOTS, MAX_LEN = 4, 128


class Item(NamedTuple):
    """Rows of one slot in a step."""

    slot: int
    start: int
    tokens: Sequence[int]
    samples: int = 0
    replays: int = 0
    holds: bool = False
    next: int = 0  # the token after the last row, where that is not sampled


class Together:
    """All ranks of the only stage as one runner, each in a thread."""

    def __init__(self, settings: Settings):
        self._size = settings.ranks_per_stage
        self._ranks = on_every_rank(self._size, lambda rank: load_runner(settings, 0, rank, lambda sentence: None))
        self.hidden, self.dtype = self._ranks[0].hidden, self._ranks[0].dtype

    def begin(self, link: TensorLink) -> None:
        boards = self._boards = Boards()

        def begin(rank: int) -> None:
            runner = self._ranks[rank]
            runner.leave()
            runner.collectives.begin(boards.groups(runner.collectives))
            runner.begin(SoloLink())

        on_every_rank(self._size, begin, boards)

    def run(self, step: Step, carried: np.ndarray | None, waited_s: float) -> Pending:
        answers = on_every_rank(self._size, lambda rank: self._ranks[rank].run(step, None, 0.0).finish(), self._boards)
        return Pending(False, lambda: answers[0])


class ByHand:
    """Stages of one rank each, or one of several, chained by the rows that they hand over. Each slot has pages of its own."""

    def __init__(self, model: Path, **values):
        values = {"model": str(model), "max_num_seqs": NUM_SLOTS, "max_model_len": MAX_LEN, "threads_per_rank": 1, **values}
        settings = make_settings({"num_pages": NUM_SLOTS * MAX_LEN // PAGE, "link": "tensor", "device": "cpu", **values})
        self.sp_from = settings.sp_from
        if settings.ranks_per_stage > 1:
            self.runners: list[Runner] | list[Together] = [Together(settings)]
        else:
            self.runners = [load_runner(settings, stage, 0, lambda sentence: None) for stage in range(settings.num_stages)]
        self.begin()

    def begin(self) -> None:
        """A new epoch."""
        self._number, self._opens, self._writes = 0, [], []
        for stage, runner in enumerate(self.runners):
            runner.begin(TensorLink(stage, 0, hidden=runner.hidden, dtype=runner.dtype))

    def open(self, slot: int, prompt: Sequence[int], shares: tuple[int, int] = (0, 0), **sampling) -> None:
        """The next step opens a slot. `shares`: (another slot, how many of its first pages this one has, too)."""
        pages = slot * (MAX_LEN // PAGE) + np.arange(MAX_LEN // PAGE)
        pages[: shares[1]] += (shares[0] - slot) * (MAX_LEN // PAGE)
        self._opens.append(Open(slot, Sampling(**{"max_tokens": 99, "temperature": 0.0, **sampling}), len(prompt), ints(prompt)))
        self._writes += [(slot, index, page) for index, page in enumerate(pages)]

    def step(
        self, *items: Item, restores: Sequence[tuple[int, int]] = (), saves: Sequence[tuple[int, int]] = (), drafts: int = 0
    ) -> Outcome:
        """What the last stage answers."""
        slots, starts, tokens, samples, replays, holds, nexts = zip(*items, strict=True)
        step = Step(
            0,
            self._number,
            ints(slots),
            ints(starts),
            ints([len(each) for each in tokens]),
            ints(samples),
            ints([token for each in tokens for token in each]),
            opens=self._opens,
            page_writes=ints(self._writes),
            replays=ints(replays),
            holds=ints(holds),
            restores=ints(restores),
            saves=ints(saves),
            nexts=ints(nexts),
            drafts=drafts,
            sp=self.sp_from is not None and sum(len(each) for each in tokens) >= self.sp_from,
        )
        self._number += 1
        self._opens, self._writes = [], []
        rows = None
        for runner in self.runners:
            answer, rows = runner.run(step, rows, 0.0).finish()
        assert isinstance(answer, Outcome)
        return answer
