"""Relocation: experts go from slot to slot, rank to rank along ep, beside the steps that are computed. Which maps are good is the
service's to say, and which slot a row goes to is parallel/placement's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from trireme.core.maps import is_legal
from trireme.parallel.collectives import Along
from trireme.parallel.comm import Group, wait_for_device
from trireme.parallel.placement import Placement

_CHUNK = 4  # experts that a rank receives at once: what is on its way takes memory, and one giant exchange hangs NCCL
_ALIGN = 16  # bytes; at which each of an expert's tensors begins in its record
_SEAL = 16  # bytes behind them: a canary (which expert of which layer it is) and a checksum, int64 both


class Unprepared(RuntimeError):
    """Maps that were not laid ready: they fit no layer, or what came for them is not what was sent."""


class Mixture(NamedTuple):
    """The experts of one layer on this rank."""

    placement: Placement
    params: Sequence[torch.Tensor]  # each [slots_per_rank, ...]: everything that belongs to an expert


class Move(NamedTuple):
    """An expert for one slot; slots are numbered over all ranks along ep."""

    layer: int
    expert: int
    source: int  # a slot that holds it
    target: int


def find_moves(old: Mapping[int, np.ndarray], new: Mapping[int, np.ndarray], slots_per_rank: int) -> list[Move]:
    """The slots of some layers that change, maps int32 [num_slots] before and after, by layer. Each gets its expert from its own rank
    where that holds it, else from the holder that has given least so far.

    Two ranks of two slots, 0 1 | 2 0 to 1 0 | 2 1: rank 0 copies both, and gives 1 to slot 3.
    """
    moves, given = [], np.zeros(max((len(map) // slots_per_rank for map in old.values()), default=0), np.int64)
    for layer, map in sorted(new.items()):
        for target in np.flatnonzero(old[layer] != map).tolist():
            holders = np.flatnonzero(old[layer] == map[target]).tolist()
            here = [slot for slot in holders if slot // slots_per_rank == target // slots_per_rank]
            source = min(here or holders, key=lambda slot: given[slot // slots_per_rank])
            if not here:
                given[source // slots_per_rank] += 1
            moves.append(Move(layer, int(map[target]), source, target))
    return moves


class Records:
    """How an expert of one layer lies in a row of bytes, which is how it travels and is staged:

    gate_up ·· down ·· canary checksum
    """

    def __init__(self, mixture: Mixture):
        self.params = mixture.params
        self._spans, start = [], 0
        for param in self.params:
            num_bytes = param[0].nbytes
            self._spans.append((start, start + num_bytes))
            start += -(-num_bytes // _ALIGN) * _ALIGN
        self._body, self.size = start, start + _SEAL

    def write(self, row: int, canary: int, record: torch.Tensor) -> None:
        """An expert of the params as a record: uint8 [size]."""
        record.zero_()
        for param, (start, end) in zip(self.params, self._spans, strict=True):
            record[start:end] = param[row].reshape(-1).view(torch.uint8)
        seal = record[self._body :].view(torch.int64)
        seal[0], seal[1] = canary, self._checksum(record)

    def is_spoilt(self, record: torch.Tensor, canary: int) -> torch.Tensor:
        """Whether a record is not whole, or not the expert that the canary names: bool []."""
        seal = record[self._body :].view(torch.int64)
        return (seal[0] != canary) | (seal[1] != self._checksum(record))

    def read(self, records: torch.Tensor, rows: torch.Tensor) -> None:
        """Put records into these rows of the params."""
        for param, (start, end) in zip(self.params, self._spans, strict=True):
            experts = records[:, start:end].view(param.dtype).reshape(len(rows), *param.shape[1:])
            param.index_copy_(0, rows, experts)

    def _checksum(self, record: torch.Tensor) -> torch.Tensor:
        """Its words, weighed by odd numbers: a word that differs changes the sum, and so do two that changed places."""
        words = record[: self._body].view(torch.int64)
        return (words * torch.arange(1, 2 * len(words), 2, device=record.device)).sum()


class _Layer(NamedTuple):
    """What is laid ready of one layer."""

    number: int
    map: np.ndarray  # int32 [num_slots]
    table: torch.Tensor  # what the placement reads of it
    records: torch.Tensor  # uint8 [n, size], in the staging buffer
    rows: torch.Tensor  # int64 [n]: of this rank's slots


class _Staged(NamedTuple):
    version: int
    layers: list[_Layer]


class Relocation:
    """One rank's part, for all layers of its stage that have experts. All ranks along ep `prepare` the same maps, each in a thread that
    steps do not wait for; afterwards `commit`, by the thread of the steps, changes what the next step reads.

        old rows --records--> staging buffer        checked; steps go on with the old rows
                              staging buffer --> rows, and the placement's tables      in stream order, at fixed addresses

    What was laid ready stays until it is committed, `drop` says that it will not be, or another is prepared.
    """

    def __init__(self, along: Along, mixtures: Sequence[Mixture], *, most_layers: int, version: int = 0):
        """`along`: ep, by a communicator of its own. `most_layers`: that one version changes."""
        self.version = version  # of the maps in force
        self._along, self._mixtures = along, mixtures
        self._records = [Records(mixture) for mixture in mixtures]
        self._staged: _Staged | None = None
        param, slots = mixtures[0].params[0], mixtures[0].placement.slots_per_rank
        self._device, self._slots_per_rank, self._most_layers = param.device, slots, most_layers
        size = max(records.size for records in self._records)
        # taken once, so that it is counted when a rank measures its memory
        self._buffer = torch.zeros(min(most_layers, len(mixtures)) * slots, size, dtype=torch.uint8, device=self._device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @property
    def passing_bytes(self) -> int:
        """What `prepare` takes on its way, beside the buffer: a chunk that is sent to all, one that came, and a checksum's numbers."""
        return (_CHUNK * self._along.size + 3) * self._buffer.shape[1]

    @property
    def staged(self) -> int:
        """The version that is laid ready, or 0."""
        staged = self._staged
        return staged.version if staged else 0

    @torch.inference_mode()
    def warm_up(self, limit_s: float, give_up: Callable[[], bool]) -> None:
        """At the beginning of an epoch, before steps, by all ranks along ep: send a full chunk every way, and put one expert where it is.
        The first time loads kernels and connects ranks, for which a GPU stands still: beside steps one of them took 1.1 s (H100).
        LinkLost where another rank does not come, in time or before `give_up` says so."""
        if self._stream is None or self._along.size == 1:
            return
        size, records = self._along.size, self._records[0]
        with self._aside():
            out = self._buffer.new_zeros(_CHUNK * size, self._buffer.shape[1])
            records.write(0, 0, out[0, : records.size])
            with self._along.held() as group:
                group.all_to_all(out, [_CHUNK] * size, [_CHUNK] * size)
                wait_for_device(self._device, limit_s, give_up)
            records.is_spoilt(out[0, : records.size], 0).tolist()
            records.read(out[:1, : records.size], torch.zeros(1, dtype=torch.int64, device=self._device))

    @torch.inference_mode()
    def prepare(self, version: int, maps: Mapping[int, np.ndarray]) -> int:
        """Lay new maps ready; the bytes that came from other ranks. Unprepared says why not; nothing is laid ready then.
        LinkLost where another rank is gone or failed."""
        self._staged = None
        for number, map in maps.items():
            placement = self._mixtures[number].placement if 0 <= number < len(self._mixtures) else None
            if placement is None or not is_legal(map, placement.num_experts, placement.num_slots):
                raise Unprepared(f"version {version}: not a map of layer {number}, of {len(self._mixtures)} with experts: {map.tolist()}")
        if len(maps) > self._most_layers:
            raise Unprepared(f"version {version} changes {len(maps)} layers, and there is room for {self._most_layers}")
        with self._aside():
            staged, num_bytes = self._stage(version, maps)
        self._staged = staged
        return num_bytes

    @torch.inference_mode()
    def commit(self, version: int) -> None:
        """Steps that are launched after this read the maps that were laid ready as `version`. To do it twice does no harm."""
        staged = self._staged
        assert staged is not None and staged.version == version, f"version {version} is not laid ready: {self.staged}"
        for layer in staged.layers:
            self._records[layer.number].read(layer.records, layer.rows)
            self._mixtures[layer.number].placement.rewrite(layer.map, version, layer.table)
        self.version, self._staged = version, None

    def drop(self) -> None:
        self._staged = None

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """In a stream of its own; whole on the device at its end. It waits for no other stream: a commit is through everywhere before
        a leader orders this, and so no rank's step ever waits for a rank that is here."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def _stage(self, version: int, maps: Mapping[int, np.ndarray]) -> tuple[_Staged, int]:
        old = {number: self._mixtures[number].placement.map for number in maps}
        moves = find_moves(old, maps, self._slots_per_rank)
        mine = [move for move in moves if self._rank_of(move.target) == self._along.place]
        places = {move: place for place, move in enumerate(mine)}  # in the buffer; moves of a layer stand together
        for move in mine:
            if self._rank_of(move.source) == self._along.place:
                self._write(move, self._buffer[places[move]])
        num_bytes = self._exchange(moves, places) if self._along.size > 1 else 0
        layers = []
        for number, map in sorted(maps.items()):
            every = [move for move in mine if move.layer == number]
            first = places[every[0]] if every else 0
            records = self._buffer[first : first + len(every), : self._records[number].size]
            table = self._mixtures[number].placement.table(map)
            rows = torch.tensor([move.target % self._slots_per_rank for move in every], dtype=torch.int64, device=self._device)
            layers.append(_Layer(number, map, table, records, rows))
        return _Staged(version, layers), num_bytes

    def _exchange(self, moves: list[Move], places: Mapping[Move, int]) -> int:
        """In chunks that all ranks cut alike: a rank's n-th expert comes in chunk n // _CHUNK. A chunk that came spoilt does not end it,
        since others wait for the next."""
        place, size = self._along.place, self._along.size
        chunks: dict[int, list[Move]] = {}
        counts = [0] * size
        for move in moves:
            target = self._rank_of(move.target)
            if self._rank_of(move.source) != target:
                chunks.setdefault(counts[target] // _CHUNK, []).append(move)
                counts[target] += 1
        spoilt: list[Move] = []
        with self._along.held() as group:
            for _, chunk in sorted(chunks.items()):
                sent = sorted((move for move in chunk if self._rank_of(move.source) == place), key=lambda move: self._rank_of(move.target))
                due = sorted((move for move in chunk if self._rank_of(move.target) == place), key=lambda move: self._rank_of(move.source))
                spoilt += self._pass(group, sent, due, places)
        if spoilt:
            what = ", ".join(f"expert {move.expert} of layer {move.layer} for slot {move.target}" for move in spoilt)
            raise Unprepared(f"came spoilt: {what}")
        return counts[place] * self._buffer.shape[1]

    def _pass(self, group: Group, sent: list[Move], due: list[Move], places: Mapping[Move, int]) -> list[Move]:
        """One chunk, `sent` by target and `due` by source. What came spoilt."""
        out = self._buffer.new_empty(len(sent), self._buffer.shape[1])
        for move, record in zip(sent, out, strict=True):
            self._write(move, record)
        ranks = range(self._along.size)
        going = [sum(self._rank_of(move.target) == rank for move in sent) for rank in ranks]
        coming = [sum(self._rank_of(move.source) == rank for move in due) for rank in ranks]
        came = group.all_to_all(out, going, coming)
        wrong = []
        for move, record in zip(due, came, strict=True):
            records = self._records[move.layer]
            wrong.append(records.is_spoilt(record[: records.size], _canary(move)))
            self._buffer[places[move]] = record
        return [move for move, bad in zip(due, torch.stack(wrong).tolist() if wrong else [], strict=True) if bad]

    def _write(self, move: Move, record: torch.Tensor) -> None:
        records = self._records[move.layer]
        records.write(move.source % self._slots_per_rank, _canary(move), record[: records.size])

    def _rank_of(self, slot: int) -> int:
        return slot // self._slots_per_rank


def _canary(move: Move) -> int:
    return (move.layer + 1) << 32 | move.expert
