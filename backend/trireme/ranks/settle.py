"""Settle: items that were planned before it was known which drafts stand. The last step of their slots says so, and here is heard before
the front hears it: where they begin, with which tokens, and how many rows their states take again.

    step k     a token and drafts   5 6 7        stage 0 ------> last stage: 6 9 stand, and 3 4 are drafted
    step k+1   unsettled                         settled: begins behind 6, with 9 3 4, and replays 5 6

A rank of the last stage has what it sampled; stage 0 gets it as the tokens that are fed back, drafts behind them. The host waits for
it, so a step is laid out and launched as any other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import torch

from trireme.core.step import Step, accepted, array, ints
from trireme.parallel.comm import reach
from trireme.parallel.link import ExpectedTokens
from trireme.ranks.rows import Rows
from trireme.ranks.staging import download

_GLANCE_S = 2e-5  # between looks at a device that other stages wait for


class News(Protocol):
    """What a step samples and drafts, int32 [Step.num_told]."""

    def read(self, give_up: Callable[[], bool]) -> np.ndarray:
        """Waits for the device; LinkLost where `give_up` says so."""
        ...


class _Owed(NamedTuple):
    rows: Rows
    drafts: int  # of each item that samples
    news: News


class Settle:
    """By slot, what became of its last sampled item: taken from steps in their order, and only as far as one is asked for.

    `depth`: nobody asks for a step any more when so many later ones have begun.
    """

    def __init__(self, max_num_seqs: int, most_drafts: int, depth: int):
        self._depth = depth
        self._tokens = np.zeros((max_num_seqs, 1 + most_drafts), np.int32)  # the token sampled last, then drafts
        self._stands = np.zeros(max_num_seqs, np.int64)  # drafts among the rows that were sampled that stand
        self.clear()

    def clear(self) -> None:
        """Forget all sequences."""
        self._owed: deque[_Owed] = deque()
        self._samples = np.zeros(len(self._tokens), np.int64)  # rows that were sampled; 0: nothing was told

    def owe(self, step: Step, rows: Rows, news: News) -> None:
        """A step, itself settled, of which `news` will tell."""
        self._owed.append(_Owed(rows, step.drafts, news))
        if len(self._owed) > self._depth:
            self._owed.popleft()

    def settle(self, step: Step, give_up: Callable[[], bool]) -> Step:
        """The step with its unsettled items as they are. May wait for the device."""
        items, slots = array(step.unsettled), array(step.slots)
        wanted = slots[items]
        while any(np.isin(wanted, owed.rows.slots[owed.rows.samples > 0]).any() for owed in self._owed):
            self._take(self._owed.popleft(), give_up)
        assert self._samples[wanted].all(), "what settles an item was told before, in this epoch"
        starts, counts, tokens, stands = array(step.starts).copy(), array(step.counts), array(step.tokens).copy(), self._stands[wanted]
        starts[items] += stands
        firsts = np.cumsum(counts) - counts
        for item, slot in zip(items.tolist(), wanted.tolist(), strict=True):
            tokens[firsts[item] : firsts[item] + counts[item]] = self._tokens[slot, : counts[item]]
        replays = step.replays
        if replays:
            every = array(replays).copy()
            every[items] = np.where(self._samples[wanted] > 1, 1 + stands, 0)
            replays = ints(every)
        return msgspec.structs.replace(step, starts=ints(starts), tokens=ints(tokens), replays=replays, unsettled=b"")

    def _take(self, owed: _Owed, give_up: Callable[[], bool]) -> None:
        told, rows = owed.news.read(give_up), owed.rows
        sampled, drafts = np.split(told, [len(rows.sampled)])
        items = np.flatnonzero(rows.samples)
        drafts, at = drafts.reshape(len(items), owed.drafts), 0
        for item, made in zip(items.tolist(), drafts, strict=True):
            slot, samples, first = rows.slots[item], rows.samples[item], rows.firsts[item]
            stands = accepted(rows.tokens[first + 1 : first + samples], sampled[at : at + samples]) if samples > 1 else 0
            self._samples[slot], self._stands[slot] = samples, stands
            self._tokens[slot, 0], self._tokens[slot, 1 : 1 + owed.drafts] = sampled[at + stands], made
            at += samples


class Own:
    """In the last stage: `told` int32 [Step.num_told], as the device will have it."""

    def __init__(self, told: torch.Tensor, limit_s: float):
        self._host, self._limit_s, self._reached = download(told), limit_s, None
        if told.is_cuda:
            self._reached = torch.cuda.Event()
            self._reached.record()

    def read(self, give_up: Callable[[], bool]) -> np.ndarray:
        if self._reached is not None:
            reach(self._reached, self._limit_s, give_up, _GLANCE_S)
        return self._host.numpy()


class Brought:
    """In stage 0: what the link brings. On a GPU it comes beside what is computed, on `stream`. The link brings one step's after
    another's: `begin` calls `wait` of those before, and this one's."""

    def __init__(
        self,
        expect: Callable[[int], ExpectedTokens],  # a link's expect_tokens
        num_told: int,
        stream: torch.cuda.Stream | None,
        limit_s: float,
        begin: Callable[[], None],
    ):
        self._stream, self._limit_s, self._begin, self._reached = stream, limit_s, begin, None
        self._here: torch.Tensor | None = None
        with torch.cuda.stream(stream):  # whose memory it takes
            self._expected = expect(num_told)

    def wait(self) -> torch.Tensor:
        """As ExpectedTokens, however often: the device waits, in the current stream."""
        if self._here is None:
            with torch.cuda.stream(self._stream):
                self._here = self._expected.wait()
                self._host = download(self._here)
                if self._here.is_cuda:
                    self._reached = torch.cuda.Event()
                    self._reached.record()
        if self._reached is not None:
            current = torch.cuda.current_stream()
            current.wait_event(self._reached)
            self._here.record_stream(current)
        return self._here

    def read(self, give_up: Callable[[], bool]) -> np.ndarray:
        if self._here is None:
            self._begin()
        if self._reached is not None:
            reach(self._reached, self._limit_s, give_up, _GLANCE_S)
        return self._host.numpy()


class ToldTokens:
    """Of what is told, the tokens that were sampled: ExpectedTokens."""

    def __init__(self, told: ExpectedTokens, num_samples: int):
        self._told, self._num_samples = told, num_samples

    def wait(self) -> torch.Tensor:
        return self._told.wait()[: self._num_samples]
