"""Drafts of the running sequences, from being asked for to what becomes of them, and how many to ask for. They are made by the last
stage."""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

import numpy as np

from trireme.core.step import FED, PAGE, accepted, array
from trireme.engine.fit import fit
from trireme.engine.sheet import Flight
from trireme.engine.slots import Slots
from trireme.engine.stats import Stats

# What a draft adds to a step, as a part of it, until that is measured: one pass of the head (a layer and the output projection) and
# one row more to verify. Where reading weights takes the time, that is 0.06 for a dense 27B of 64 layers, and 0.2 for a 35B with 3B
# active parameters, whose output projection is a sixth of those.
_FIRST_COST = 0.15
_LEAST_SAMPLES = 8  # of steps with another number of drafts than most have: below, nothing is fitted
_MOST_SAMPLES = 1024  # the latest
_FIT_EVERY = 64  # samples
_WEIGHT = 1 / 64  # of the latest draft in an average, once there were so many
_FIRST_RATE, _FIRST_DRAFTS = 0.8, 4  # until something is known: all may be tried; and as how many drafts this counts
_PROBE_EVERY = 64  # times asked: then all are drafted, so that rates of positions out of use stay true
_PROBE_ONE, _PROBE_NONE = 21, 42  # amid those times one is, and none: steps differ then, by which it can be told what drafts cost


class Cost(NamedTuple):
    """As parts of a step without drafts."""

    wait: float  # what a step costs that verifies any, however many: it begins only once it is known which drafts of the last one stand
    draft: float  # and each draft


class DraftCost:
    """What drafts add to a step, fitted to steps that were measured: seconds = step + row x rows + pass x drafts + wait, where it
    verifies drafts. Rows are those of all sequences, drafts among them; each draft is one pass of the head for all sequences."""

    def __init__(self):
        self._samples: deque[tuple[float, float, float, float, float]] = deque(maxlen=_MOST_SAMPLES)
        self._found: tuple[float, float, float, float] | None = None
        self._num_new = 0  # samples since it was looked for

    def learn(self, num_rows: int, num_drafts: int, verifies: bool, seconds: float) -> None:
        """A step all of whose rows are sampled, and how long it took the first stage: from the end of its step before."""
        self._samples.append((1.0, num_rows, num_drafts, verifies, seconds))
        self._num_new += 1
        if self._num_new < _FIT_EVERY:
            return
        self._num_new, samples = 0, np.array(self._samples)
        usual = Counter(samples[:, 2].tolist()).most_common(1)[0][1]
        if len(samples) - usual >= _LEAST_SAMPLES:  # else what a draft costs cannot be told from what a step does
            step, row, draft, wait = fit(samples).tolist()
            self._found = (step, row, draft, wait) if step + row > 0 else None

    def of(self, num_sequences: int) -> Cost:
        """In steps of so many sequences that all draft."""
        if self._found is None:
            return Cost(0.0, _FIRST_COST)
        step, row, draft, wait = self._found
        without = step + row * num_sequences
        return Cost(wait / without, (row * num_sequences + draft) / without)


class DraftLength:
    """`rates[i]`: how often draft i stood where those before it did, averaged over the drafts of all sequences, exponentially once
    there were many."""

    def __init__(self, most: int, *, adapts: bool = True):
        self.rates, self.cost = [_FIRST_RATE] * most, DraftCost()
        self._num_learnt = [_FIRST_DRAFTS] * most
        self._adapts = adapts
        self._num_asked = 0

    def learn(self, num_drafts: int, num_accepted: int) -> None:
        """Of a sequence's `num_drafts` drafts the first `num_accepted` stood. Those behind the first that fell say nothing."""
        for position in range(min(num_drafts, num_accepted + 1)):
            self._num_learnt[position] += 1
            weight = max(_WEIGHT, 1 / self._num_learnt[position])
            self.rates[position] += weight * ((position < num_accepted) - self.rates[position])

    def ask(self, num_sequences: int = 1) -> int:
        """Drafts for the next step, which has so many sequences."""
        self._num_asked += 1
        if not self._adapts:
            return len(self.rates)
        probe = {0: len(self.rates), _PROBE_ONE: 1, _PROBE_NONE: 0}.get(self._num_asked % _PROBE_EVERY)
        return self.best(num_sequences) if probe is None else probe

    def best(self, num_sequences: int = 1) -> int:
        """The number of drafts with the most tokens for a step's cost.

        rates [0.3, 0.3], a draft costs 0.15 of a step and verifying nothing: 1 gives 1.3 tokens for 1.15 steps, 2 give 1.39 for 1.3:
        so 1. With rates [0.1, 0.1] it is none, and so it is where 1 waits for a half of a step.
        """
        tokens, stands, cost = 1.0, 1.0, self.cost.of(num_sequences)
        worth = [1.0]
        for num_drafts, rate in enumerate(self.rates, 1):
            stands *= rate
            tokens += stands
            worth.append(tokens / (1 + cost.wait + cost.draft * num_drafts))
        return worth.index(max(worth))


class Drafts:
    """Their numbers stand in Slots.

    ask --a step makes them--> verify takes them --keep what has a place--> rows of the next step --verify--> tokens, rows to replay

    An unsettled item is kept and has its rows before `verify` has taken its drafts.
    """

    def __init__(self, slots: Slots, length: DraftLength, stats: Stats):
        self._slots, self._length, self._stats = slots, length, stats

    def ask(self, sampled: np.ndarray, number: int) -> int:
        """How many step `number` shall make for each item that samples, of these slots. What may verify one next is
        unsettled until then, or waits."""
        slots = self._slots
        drafting = sampled[slots.drafting[sampled] & (slots.length[sampled] + 1 < slots.limit[sampled])]
        num_drafts = self._length.ask(len(sampled)) if len(drafting) else 0
        if num_drafts:
            slots.awaits[drafting], slots.coming[drafting] = number, num_drafts
        return num_drafts

    def keep(self, chosen: np.ndarray, room: int, num_free: int, num_returned: int) -> None:
        """Of these slots' drafts only those that have a place: in `room` rows, before the limit, and in pages, `num_free` new ones."""
        slots = self._slots
        there = np.where(slots.unsettled(chosen, num_returned), slots.coming[chosen], slots.num_drafts[chosen])
        wanted = np.minimum(there, slots.limit[chosen] - slots.length[chosen] - 1)
        wanted = np.clip(room - (np.cumsum(wanted) - wanted), 0, wanted)
        held = slots.held[chosen] * PAGE - slots.reach(chosen, num_returned) - 1  # places in its pages; below 0: it needs one anyhow
        if np.count_nonzero(wanted > held) > num_free:
            wanted = np.where(held < 0, wanted, np.minimum(wanted, held))
        slots.num_drafts[chosen] = wanted

    def rows(self, chosen: np.ndarray, tokens: np.ndarray, unsettled: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, rows to replay, of each slot; all rows' tokens) of step `number`: a slot's drafts come behind its token, and all are
        verified. `unsettled`: which of the slots have neither token nor drafts yet."""
        slots = self._slots
        num_drafts, replays = slots.num_drafts[chosen], slots.replays[chosen]
        rows = np.column_stack((tokens, np.where(unsettled[:, None], FED, slots.drafts[chosen])))
        slots.replays[chosen], slots.num_drafts[chosen], slots.coming[chosen], slots.unsure[chosen] = 0, 0, 0, num_drafts
        slots.awaits[chosen[num_drafts > 0]] = number
        return 1 + num_drafts, replays, rows[np.arange(rows.shape[1]) <= num_drafts[:, None]]

    def verify(self, flight: Flight, sampled: np.ndarray, drafts: bytes) -> list[int]:
        """How many of each item's sampled tokens are its sequence's: drafts that stood, and one more. Slots take them, and `drafts`
        for what comes next."""
        slots, at = self._slots, 0
        stands, coming = [], iter(array(drafts).reshape(len(flight.sampled), flight.drafts))
        for sequence, samples in zip(flight.sequences, flight.samples, strict=True):
            slot, num_drafts, num_accepted = sequence.slot, samples - 1, 0
            is_last = slots.last_step[slot] == flight.number  # else the ranks have settled the next item
            if num_drafts > 0:
                num_accepted = accepted(slots.drafts[slot, :num_drafts], sampled[at : at + samples])
                slots.replays[slot] = 1 + num_accepted if is_last else 0
                self._length.learn(num_drafts, num_accepted)
                self._stats.verified(num_drafts, num_accepted)
            if samples:
                slots.advance(slot, 1 + num_accepted, sampled[at + num_accepted])
                slots.drafts[slot, : flight.drafts] = next(coming)
                if is_last:
                    slots.num_drafts[slot] = slots.coming[slot]
            stands.append(1 + num_accepted if samples else 0)
            at += samples
        return stands
