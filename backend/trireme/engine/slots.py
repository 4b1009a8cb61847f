"""Slots: the numbers of every running sequence in arrays, so that many decodes are planned without a loop. No page is known here."""

from __future__ import annotations

import numpy as np

_UNEVEN = 0.02  # of the ready sequences' keys: where all could go, one is left if that brings the step so much nearer to its share


class Slots:
    """Rows of int64 or bool [num_slots]. Of one sequence:

        0 ........ planned ........ known ........ length ........ limit
        rows computed   tokens to      sampled by     may come
        or in flight    compute        steps in flight

    A decoding sequence has exactly one token to compute: planned == length - 1. Its drafts come on top: they count in none of
    these until the step that verifies them has returned. What is planned before that is unsettled: `unsure` more rows may stand.
    """

    def __init__(self, num_slots: int, most_drafts: int = 0):
        self.planned = np.zeros(num_slots, np.int64)  # rows that steps have been told to compute
        self.known = np.zeros(num_slots, np.int64)  # tokens in the log
        self.length = np.zeros(num_slots, np.int64)  # tokens in the log and those sampled by steps in flight
        self.limit = np.zeros(num_slots, np.int64)  # tokens at the most
        self.held = np.zeros(num_slots, np.int64)  # pages
        self.last_step = np.full(num_slots, -1, np.int64)  # the last step that names the slot
        self.before = np.full(num_slots, -1, np.int64)  # and of those that sample it the last but one
        self.token = np.zeros(num_slots, np.int64)  # the last token of the log, once decoding
        self.live = np.zeros(num_slots, bool)  # may be planned
        self.decoding = np.zeros(num_slots, bool)  # its whole log has been planned
        self.fed = np.zeros(num_slots, bool)  # may run ahead of its tokens
        self.drafting = np.zeros(num_slots, bool)  # may have drafts
        self.routed = np.zeros(num_slots, bool)  # tells the experts of its rows
        self.drafts = np.zeros((num_slots, most_drafts), np.int64)
        self.num_drafts = np.zeros(num_slots, np.int64)  # of `drafts`, those for the next item
        self.coming = np.zeros(num_slots, np.int64)  # drafts that its last step makes
        self.unsure = np.zeros(num_slots, np.int64)  # drafts that its last step verifies
        self.awaits = np.full(num_slots, -1, np.int64)  # the last step that brings or verifies its drafts: sooner, an item is unsettled
        self.replays = np.zeros(num_slots, np.int64)  # rows that the stages hold aside and that stood: states are to take them
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def open(self, *, planned: int, length: int, limit: int, held: int, fed: bool, drafting: bool, routed: bool) -> int:
        """The number of a free slot, taken."""
        slot = self._free.pop()
        self.planned[slot], self.known[slot], self.length[slot] = planned, length, length
        self.limit[slot], self.held[slot], self.fed[slot] = limit, held, fed
        self.last_step[slot], self.before[slot], self.live[slot], self.decoding[slot] = -1, -1, True, False
        self.routed[slot] = routed
        self.drafting[slot], self.num_drafts[slot], self.awaits[slot], self.replays[slot] = drafting, 0, -1, 0
        self.coming[slot] = self.unsure[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        self.live[slot] = False
        self._free.append(slot)

    def decodes(self) -> np.ndarray:
        """bool [num_slots]: decoding, with a token still to come."""
        return self.live & self.decoding & (self.length < self.limit)

    def ready(self, decodes: np.ndarray, number: int, num_returned: int, num_stages: int, *, ahead: bool, unsettled: bool) -> np.ndarray:
        """Slots that step `number` may decode, least recently planned first.

        A fed-back sequence is best planned once in num_stages steps: sooner, stage 0 would stand still until the step
        before has gone through all stages. With `ahead` it is planned all the same, those of the oldest step only. `unsettled`: also
        while a step of theirs, but one alone, has not told which drafts stand, as long as all could before the limit.
        """
        fed = self.fed & (self.awaits < num_returned)
        if unsettled:
            fits = self.planned + self.unsure + self.coming + 1 < self.limit
            fed |= self.fed & self.drafting & ~self.routed & (self.before < num_returned) & fits
        ready = decodes & ((self.known == self.length) | fed)
        if ahead:
            slots = np.flatnonzero(ready)
            return slots[self.last_step[slots] == self.last_step[slots].min()] if len(slots) else slots
        slots = np.flatnonzero(ready & (self.last_step < max(number - num_stages + 1, num_returned)))
        return slots[np.argsort(self.last_step[slots], kind="stable")]

    def deal(self, ready: np.ndarray, decodes: np.ndarray, most: int) -> np.ndarray:
        """Of the ready slots [n], as `ready` gives them, at most `most`, in that order: [k], k > 0 where n and `most` are; `decodes`:
        bool [num_slots]. Steps that take turns should read equally many keys, since their stages wait for one another: so those are
        left to the next step without whom this one has its share, and one of several also where all could go and this one has too
        many. Only those planned last are left, so that nobody waits while others are planned twice.

        Keys 9 2 5 1 are ready, 4 3 in flight, and three are taken: of all 24 a step should read 12, so 5 is left, not the last one.
        """
        num_decodes = int(np.count_nonzero(decodes))
        may_wait = np.flatnonzero(self.last_step[ready] == self.last_step[ready].max(initial=-1))
        waits = max(0, len(ready) - most)
        if most >= num_decodes or waits >= len(may_wait):
            return ready[:most]
        keys, takes = self.planned[ready] + 1, np.ones(len(ready), bool)
        over = keys.sum() - (self.planned[decodes] + 1).mean() * most  # keys of those who are left, if all goes well
        if not waits and len(ready) > 1 and over - np.abs(keys[may_wait] - over).min() > _UNEVEN * keys.sum():
            waits = 1
        for left in range(waits, 0, -1):
            at = int(np.abs(keys[may_wait] - over / left).argmin())
            takes[may_wait[at]] = False
            over -= keys[may_wait[at]]
            may_wait = np.delete(may_wait, at)
        return ready[takes]

    def unsettled(self, chosen: np.ndarray, num_returned: int) -> np.ndarray:
        """Which of these slots' next items would be unsettled."""
        return self.awaits[chosen] >= num_returned

    def reach(self, chosen: np.ndarray, num_returned: int) -> np.ndarray:
        """Where these slots' next items may begin at the latest."""
        return self.planned[chosen] + np.where(self.unsettled(chosen, num_returned), self.unsure[chosen], 0)

    def advance(self, slot: int, num_tokens: int, last: int) -> None:
        """So many tokens have come of a step that was to bring at least one: drafts that stood, and `last` after them."""
        self.known[slot] += num_tokens
        self.planned[slot] += num_tokens - 1
        self.length[slot] += num_tokens - 1
        self.token[slot] = last
