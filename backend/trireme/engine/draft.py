"""DraftLength: how many tokens to draft, by how many were accepted lately. Drafts themselves are made by the last stage."""

from __future__ import annotations

# What a draft adds to a step, as a part of it: one pass of the head (a layer and the output projection) and one row more to verify.
# Where reading weights takes the time, that is 0.06 for a dense 27B of 64 layers, and 0.2 for a 35B with 3B active parameters, whose
# output projection is a sixth of those. The length that is best changes little in between.
_COST = 0.15
_WEIGHT = 1 / 64  # of the latest draft in an average
_FIRST_RATE = 0.8  # until something is known: all may be tried
_PROBE_EVERY = 64  # times asked: then all are drafted, so that rates of positions out of use stay true


class DraftLength:
    """`rates[i]`: how often draft i stood where those before it did, exponentially averaged over the drafts of all sequences."""

    def __init__(self, most: int, *, adapts: bool = True):
        self.rates = [_FIRST_RATE] * most
        self._adapts = adapts
        self._num_asked = 0

    def learn(self, num_drafts: int, num_accepted: int) -> None:
        """Of a sequence's `num_drafts` drafts the first `num_accepted` stood. Those behind the first that fell say nothing."""
        for position in range(min(num_drafts, num_accepted + 1)):
            self.rates[position] += _WEIGHT * ((position < num_accepted) - self.rates[position])

    def ask(self) -> int:
        """Drafts for the next step."""
        self._num_asked += 1
        return len(self.rates) if not self._adapts or self._num_asked % _PROBE_EVERY == 0 else self.best()

    def best(self) -> int:
        """The number of drafts, from 1, with the most tokens for a step's cost.

        rates [0.3, 0.3]: 1 draft gives 1.3 tokens for 1.15 steps, 2 give 1.39 for 1.3: so 1.
        """
        tokens, stands = 1.0, 1.0
        worth: list[float] = []
        for num_drafts, rate in enumerate(self.rates, 1):
            stands *= rate
            tokens += stands
            worth.append(tokens / (1 + _COST * num_drafts))
        return 1 + worth.index(max(worth))
