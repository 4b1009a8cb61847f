"""Sheet: a step being planned; Flight: one that has not returned, as the scheduler remembers it. No decisions here."""

from __future__ import annotations

from dataclasses import dataclass, field

from trireme.core.settings import Limits
from trireme.core.step import Open, Regime, Step, ints
from trireme.engine.sequence import Sequence
from trireme.engine.states import Snapshots


@dataclass
class Flight:
    """Lists over the step's items."""

    number: int
    sequences: list[Sequence] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # tokens computed once the step has returned; of drafts those that stand come on top
    samples: list[int] = field(default_factory=list)  # rows that are sampled
    prompt_rows: int = 0
    drafts: int = 0  # that the last stage makes for each item that samples
    verifies: bool = False  # whether an item has drafts among its rows


class Sheet:
    """A step's fields in pieces, and its flight."""

    def __init__(self, number: int):
        self.flight = Flight(number)
        self.slots: list[int] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.tokens: list[bytes] = []
        self.opens: list[Open] = []
        self.writes: list[tuple[int, int, int]] = []
        self.bans: list[tuple[int, list[int]]] = []
        self.returns = False
        self.replays: list[int] = []
        self.restores: list[tuple[int, int]] = []
        self.saves: list[tuple[bytes, int]] = []  # (name of a prefix, slot whose states stand for it after the step)
        self.nexts: list[int] = []

    @property
    def num_rows(self) -> int:
        return sum(self.counts)

    def step(self, epoch: int, limits: Limits, snapshots: Snapshots, maps: list[int]) -> Step:
        """The whole. Snapshots are taken only now: one that is saved by this step is there for the next. `maps`: version of each
        stage's expert maps."""
        flight = self.flight
        regime = Regime.of(self.counts, limits.sp_from, limits.cp if flight.prompt_rows else 1)
        keeps_states = limits.num_snapshots is not None
        # A row taken twice has only its last copy: the first has lost its name.
        saves = {snapshots.take(name): slot for name, slot in self.saves if snapshots.find(name) is None}
        return Step(
            epoch=epoch,
            number=flight.number,
            slots=ints(self.slots),
            starts=ints(self.starts),
            counts=ints(self.counts),
            samples=ints(flight.samples),
            tokens=b"".join(self.tokens),
            opens=self.opens,
            page_writes=ints(self.writes),
            bans=self.bans,
            returns=self.returns,
            sp=regime.sp,
            cp=regime.cp,
            replays=ints(self.replays) if keeps_states else b"",
            holds=ints([samples > 1 for samples in flight.samples]) if keeps_states else b"",
            restores=ints(self.restores),
            saves=ints([(slot, row) for row, slot in saves.items()]),
            nexts=ints(self.nexts) if limits.num_drafts else b"",
            drafts=flight.drafts,
            counts_loads=limits.count_every is not None and (flight.number + 1) % limits.count_every == 0,
            maps=maps if any(maps) else [],
        )
