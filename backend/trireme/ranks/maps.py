"""StageMaps: a stage's expert maps as its leader knows them, from an offer of the service to the step from which they are in force.
No sockets and no threads; what ranks do of it is ranks/mixtures'."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trireme.core.control import Offer, Prepare, Push
from trireme.core.step import ints


class StageMaps:
    """
    offered --every rank is ready, a step of the epoch is through--> ordered --all have prepared--> ready --a step is stamped--> in force

    Maps are in force as soon as a step that is stamped with them goes to the ranks: all of them have them laid ready, so those
    that did not come to compute it can follow, and one that starts again loads them. Whatever is not in force when the epoch ends
    is dropped by all.
    """

    def __init__(self, maps: Mapping[int, np.ndarray]):
        """`maps`: those that the stage begins with, int32 [num_slots] by layer, where not trivial."""
        self.version = 0
        self.maps = dict(maps)
        self.fault = ""  # why the last offer was dropped, until it is told
        self.moved_bytes = 0  # between ranks, until it is told
        self._offer: Offer | None = None
        self._ordered: Prepare | None = None
        self._ready: Prepare | None = None
        self.stalled_s = 0.0  # that putting maps in force took, until it is told
        self.settled = False  # whether every rank has computed a step of this epoch with the maps in force

    @property
    def ready(self) -> int:
        """The version that all ranks have laid ready, or have."""
        return self._ready.version if self._ready is not None else self.version

    def begin(self) -> None:
        """A new epoch."""
        self.settled = False

    def offer(self, offer: Offer) -> None:
        """New maps from the service. The same again changes nothing, nor do older ones."""
        known = self._ready or self._ordered or self._offer
        if offer.version > (known.version if known is not None else self.version):
            self._offer = offer

    def order(self, epoch: int) -> Prepare | None:
        """What ranks are to prepare now, if anything. They begin once no rank has anything to do for the maps before, so that on a
        GPU no step waits for what waits for a step."""
        if self._offer is None or not self.settled or self._ordered is not None or self._ready is not None:
            return None
        self._ordered, self._offer = Prepare(epoch, self._offer.version, self._offer.maps), None
        return self._ordered

    def prepared(self, prepare: Prepare, moved_bytes: int) -> None:
        """Every rank has."""
        if prepare is self._ordered:
            self._ordered, self._ready = None, prepare
            self.moved_bytes += moved_bytes

    def failed(self, prepare: Prepare, why: str) -> None:
        """A rank has not, and says why."""
        if prepare is self._ordered:
            self.drop(why)

    def stamp(self, version: int) -> str:
        """A step goes to the ranks, for which the front says that these maps are in force, 0 for those there are. Why not, or empty."""
        if version in (0, self.version):
            return ""
        if self._ready is None or version != self._ready.version:
            return f"expert maps of version {version} are stamped; {self.version} are in force and {self.ready} ready"
        self.version, self.settled = version, False
        self.maps |= {layer: np.frombuffer(packed, np.int32) for layer, packed in self._ready.maps.items()}
        self._ready = None
        return ""

    def computed(self, version: int, stalled_s: float = 0.0) -> None:
        """Every rank has computed a step of this epoch with these maps in force."""
        self.settled = self.settled or version == self.version
        self.stalled_s += stalled_s

    def push(self, stage: int, number: int, version: int, loads: np.ndarray, num_steps: int) -> Push:
        """What the service is to know after step `number`, which had maps `version`: loads int32 [layers, num_experts] of the last
        num_steps steps, and what else has happened since the last push."""
        told = Push(stage, number, version, ints(loads), num_steps, self.moved_bytes, self.stalled_s, self.fault)
        self.moved_bytes, self.stalled_s, self.fault = 0, 0.0, ""
        return told

    def drop(self, why: str) -> None:
        """Of what is not in force nothing is kept. The service is told, and offers anew."""
        dropped = self._ready or self._ordered or self._offer
        if dropped is not None:
            self.fault = f"maps of version {dropped.version} were dropped: {why}"
            self._offer = self._ordered = self._ready = None
