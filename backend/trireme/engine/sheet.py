"""Sheet: a step being planned; Flight: one that has not returned, as the scheduler remembers it. No decisions here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trireme.core.settings import Limits
from trireme.core.step import Open, Regime, Step, ints
from trireme.engine.sequence import Sequence
from trireme.engine.states import Snapshots

Each = np.ndarray | int  # int [n], a number an item; or one for all


@dataclass
class Flight:
    """Lists over the step's items."""

    number: int
    sequences: list[Sequence]
    ends: list[int]  # tokens computed once the step has returned; of an item with drafts, or unsettled, only what stands then tells
    samples: list[int]  # rows that are sampled
    sampled: np.ndarray  # int64: slots of the items that sample
    prompt_rows: int
    drafts: int  # that the last stage makes for each item that samples
    verifies: bool  # whether an item has drafts among its rows
    routed: list[tuple[int, int, int]]  # (item, position of its first row, rows) of those that tell the experts of their rows


class Sheet:
    """A step's fields in pieces."""

    def __init__(self, number: int):
        self.number = number
        self.sequences: list[Sequence] = []  # of the items
        self.num_rows = 0
        self.prompt_rows = 0
        self.opens: list[Open] = []
        self.writes: list[tuple[int, int, int]] = []
        self.bans: list[tuple[int, list[int]]] = []
        self.restores: list[tuple[int, int]] = []
        self.saves: list[tuple[bytes, int]] = []  # (name of a prefix, slot whose states stand for it after the step)
        self.drafts = 0
        self.returns = False
        self.routed = np.zeros(0, np.int64)  # items that tell the experts of their rows
        self.unsettled = np.zeros(0, np.int64)  # items
        self._parts: list[np.ndarray] = []  # int32 [6, n] each, of `items`
        self._tokens: list[bytes] = []

    def add(
        self,
        sequences: list[Sequence],
        slots: Each,
        starts: Each,
        counts: Each,
        tokens: bytes,
        *,
        samples: Each,
        replays: Each = 0,
        nexts: Each = -1,
    ) -> None:
        """Items more; numbers and tokens as in Step."""
        part = np.empty((6, len(sequences)), np.int32)
        part[0], part[1], part[2], part[3], part[4], part[5] = slots, starts, counts, samples, replays, nexts
        self.sequences += sequences
        self.num_rows += len(tokens) // 4
        self._parts.append(part)
        self._tokens.append(tokens)

    @cached_property
    def items(self) -> tuple[np.ndarray, ...]:
        """slots, starts, counts, samples, replays, nexts: int32 [items], once all are added."""
        return tuple(self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts, axis=1))

    @cached_property
    def sampled(self) -> np.ndarray:
        """int64: slots of the items that sample."""
        slots, _, _, samples, *_ = self.items
        return slots[samples > 0].astype(np.int64)  # by which numpy looks up faster

    def flight(self) -> Flight:
        _, starts, counts, samples, *_ = self.items
        rows = samples.tolist()
        verifies = sum(rows) > len(self.sampled)
        at = self.routed
        routed = list(zip(at.tolist(), starts[at].tolist(), counts[at].tolist(), strict=True))
        ends = (starts + counts).tolist()
        return Flight(self.number, self.sequences, ends, rows, self.sampled, self.prompt_rows, self.drafts, verifies, routed)

    def step(self, epoch: int, limits: Limits, snapshots: Snapshots, maps: list[int], *, records: bool = False) -> Step:
        """The whole. Snapshots are taken only now: one that is saved by this step is there for the next. `maps`: version of each
        stage's expert maps."""
        slots, starts, counts, samples, replays, nexts = self.items
        regime = Regime.of(counts.tolist(), limits.sp_from, limits.cp if self.prompt_rows else 1)
        keeps_states = limits.num_snapshots is not None
        return Step(
            epoch=epoch,
            number=self.number,
            slots=slots.tobytes(),
            starts=starts.tobytes(),
            counts=counts.tobytes(),
            samples=samples.tobytes(),
            tokens=b"".join(self._tokens),
            opens=self.opens,
            page_writes=ints(self.writes),
            bans=self.bans,
            returns=self.returns,
            sp=regime.sp,
            cp=regime.cp,
            replays=replays.tobytes() if keeps_states else b"",
            holds=ints(samples > 1) if keeps_states else b"",
            restores=ints(self.restores) if keeps_states else b"",
            saves=self._take_snapshots(snapshots) if keeps_states else b"",
            nexts=nexts.tobytes() if limits.num_drafts else b"",
            drafts=self.drafts,
            counts_loads=limits.count_every is not None and (self.number + 1) % limits.count_every == 0,
            routed=ints(self.routed),
            maps=maps if any(maps) else [],
            records=records,
            unsettled=ints(self.unsettled),
        )

    def _take_snapshots(self, snapshots: Snapshots) -> bytes:
        """Step.saves. A row taken twice has only its last copy: the first has lost its name."""
        rows = {snapshots.take(name): slot for name, slot in self.saves if snapshots.find(name) is None}
        return ints([(slot, row) for row, slot in rows.items()])
