"""Relocation: experts go from slot to slot, rank to rank along ep, beside the steps that are computed. Which maps are good is the
service's to say, and which slot a row goes to is parallel/placement's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from trireme.core.maps import is_legal
from trireme.parallel.collectives import Along
from trireme.parallel.comm import Group, LinkLost, make_unless
from trireme.parallel.mapping import Exchange, map_others
from trireme.parallel.placement import Placement

# A rank receives so many experts at once, but no more bytes than these unless one expert alone is larger. Memory is set aside for them,
# and what steps send meets them on the same wires: 32 MiB are 0.1 ms of NVLink, 1.3 ms of PCIe 4.0.
_CHUNK = 4
_CHUNK_BYTES = 32 << 20
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
        self.size = start  # without canary and checksum

    def write(self, row: int, record: torch.Tensor) -> None:
        """An expert of the params as a record: uint8 [at least size]. What lies between its tensors stays."""
        for param, (start, end) in zip(self.params, self._spans, strict=True):
            record[start:end].view(param.dtype).copy_(param[row].reshape(-1))

    def read(self, records: torch.Tensor, rows: torch.Tensor) -> None:
        """Put records into these rows of the params."""
        for param, (start, end) in zip(self.params, self._spans, strict=True):
            experts = records[:, start:end].view(param.dtype).reshape(len(rows), *param.shape[1:])
            param.index_copy_(0, rows, experts)


class Seals:
    """Behind each record of a chunk a canary and a checksum of all before it, padding too: its words, weighed by odd numbers, so that
    a word that differs changes the sum, and so do two that changed places. The products have memory of their own: they are
    as large as the chunk."""

    def __init__(self, size: int, chunk: int, device: torch.device):
        """Records of `size` bytes with their seals, `chunk` of them at once."""
        self._body = size - _SEAL
        self._weights = torch.arange(1, 2 * (self._body // 8), 2, device=device)
        self._products = torch.empty(chunk, len(self._weights), dtype=torch.int64, device=device)

    def put(self, records: torch.Tensor, canaries: list[int]) -> None:
        """On uint8 [n, size]."""
        seals = records[:, self._body :].view(torch.int64)
        seals[:, 0] = torch.tensor(canaries, device=records.device)
        seals[:, 1] = self._sums(records)

    def spoilt(self, records: torch.Tensor, canaries: list[int]) -> list[bool]:
        """Of uint8 [n, size]: whether each is not whole, or not the expert that its canary names. Waits for the device."""
        seals = records[:, self._body :].view(torch.int64)
        found = torch.column_stack([seals, self._sums(records)]).tolist()
        return [canary != due or told != summed for (canary, told, summed), due in zip(found, canaries, strict=True)]

    def _sums(self, records: torch.Tensor) -> torch.Tensor:
        """int64 [n]."""
        parts = records[:, : self._body].view(torch.int64).split(len(self._products))
        sums = [torch.mul(part, self._weights, out=self._products[: len(part)]).sum(1) for part in parts]
        return sums[0] if len(sums) == 1 else torch.cat(sums)


class _Layer(NamedTuple):
    """What is laid ready of one layer."""

    number: int
    map: np.ndarray  # int32 [num_slots]
    table: torch.Tensor  # what the placement reads of it, on the host
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

    Ranks speak through a group of their processes. On GPUs a rank copies what it is due out of the memory of the others, once they say
    that it is there: no kernel waits for another rank. One that did would take multiprocessors from the steps, and hang them where two
    ranks load a kernel or allocate just then, which waits for the device. Where ranks do not see each other's memory, and on CPUs,
    experts go through the group.

    What was laid ready stays until it is committed, `drop` says that it will not be, or another is prepared; by then a step with it is
    through. All memory is taken once, when a rank's is measured: in mid-serving an allocation would make the device wait.
    """

    def __init__(self, along: Along, mixtures: Sequence[Mixture], *, most_layers: int, version: int = 0):
        """`along`: ep, by a communicator of its own, between processes. `most_layers`: that one version changes."""
        self.version = version  # of the maps in force
        self._along, self._mixtures = along, mixtures
        self._records = [Records(mixture) for mixture in mixtures]
        self._staged: _Staged | None = None
        param, placement = mixtures[0].params[0], mixtures[0].placement
        self._device, self._slots_per_rank, self._most_layers = param.device, placement.slots_per_rank, min(most_layers, len(mixtures))
        size = max(records.size for records in self._records) + _SEAL
        self._chunk = max(1, min(_CHUNK, _CHUNK_BYTES // size))
        num_staged, on_gpu = self._most_layers * placement.slots_per_rank, self._device.type == "cuda"
        self._buffer = self._bytes(num_staged, size)
        self._sent, self._came = self._bytes(self._chunk * (along.size - 1), size), self._bytes(self._chunk, size)
        self._seals = Seals(size, self._chunk, self._device)
        self._rows = torch.zeros(num_staged, dtype=torch.int64, device=self._device)
        self._told_rows = torch.zeros(num_staged, dtype=torch.int64, pin_memory=on_gpu)
        table = placement.table(placement.map)
        self._tables = torch.zeros(self._most_layers, *table.shape, dtype=table.dtype, pin_memory=on_gpu)
        self._sources: list[torch.Tensor] | None = None  # `_sent` of each place, where they are to be seen in this epoch
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None
        self._busy = threading.Lock()  # who has the buffers: a thread of the epoch before may still be in `prepare`

    @property
    def staged(self) -> int:
        """The version that is laid ready, or 0."""
        staged = self._staged
        return staged.version if staged else 0

    def warm_up(self, limit_s: float, give_up: Callable[[], bool]) -> str:
        """At the beginning of an epoch, before steps, by all ranks along ep: see each other's memory, and walk the whole way once, which
        leaves every expert where it is. The first time loads kernels, for which a GPU stands still: beside steps one of them took 1.1 s,
        and 67 ms more were lost when several experts moved at once for the first time (H100). LinkLost where another rank does not
        come, in time or before `give_up` says so. How experts will go, in words; nothing on a CPU."""
        if self._stream is None:
            return ""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # maps may just have been put in force

        def meet(_: Callable[[], bool]) -> str:
            if not self._busy.acquire(timeout=limit_s):
                raise LinkLost(f"experts of the epoch before are still on their way after {limit_s:g} s")
            try:
                with torch.inference_mode(), self._along.held() as group, self._aside():
                    return self._meet(group)
            finally:
                self._busy.release()

        return make_unless(give_up, meet)

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
        with self._along.held() as group, self._busy, self._aside():
            layers, num_bytes, spoilt = self._stage(group, maps)
        if spoilt:
            what = ", ".join(f"expert {move.expert} of layer {move.layer} for slot {move.target}" for move in spoilt)
            raise Unprepared(f"came spoilt: {what}")
        self._staged = _Staged(version, layers)
        return num_bytes

    @torch.inference_mode()
    def commit(self, version: int) -> None:
        """Steps that are launched after this read the maps that were laid ready as `version`. To do it twice does no harm."""
        staged = self._staged
        assert staged is not None and staged.version == version, f"version {version} is not laid ready: {self.staged}"
        for layer in staged.layers:
            self._put(layer, version)
        self.version, self._staged = version, None

    def drop(self) -> None:
        """Of an epoch that is over."""
        self._staged = self._sources = None

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """In a stream of its own; whole on the device at its end. It waits for no other stream: a commit is through everywhere before
        a leader orders this, and so no rank's step ever waits for a rank that is here."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._wait()

    def _meet(self, group: Group) -> str:
        """Try to see the others' memory, and then whether what comes that way is what was sent."""
        why = self._map(group)
        if not why:
            if _agree(group, self._along.size, not self._walk(group)):
                return "experts are copied from GPU to GPU"
            self._sources, why = None, "what came out of another's memory was not what was sent"
        if spoilt := self._walk(group):
            raise LinkLost(f"experts come spoilt by way of the hosts, too: {spoilt}")
        return f"experts go by way of the hosts: {why}"

    def _map(self, group: Group) -> str:
        """See the memory that every rank sends from; or why not, for some rank."""
        others = map_others(self._sent, self._along.place, self._along.size, self._device, _by_way_of(group, self._along.size))
        if isinstance(others, str):
            return others
        self._sources = [others.get(place, self._sent) for place in range(self._along.size)]
        return ""

    def _walk(self, group: Group) -> list[Move]:
        """What `prepare` and `commit` do, with experts that stay: a chunk for every rank, of those after it in turns, and a layer. What
        came spoilt."""
        size, n, placement = self._along.size, self._slots_per_rank, self._mixtures[0].placement
        rows = list(range(min(n, self._chunk)))
        slots = [(target, (target + 1 + row % (size - 1)) % size * n + row) for target in range(size) for row in rows]
        moves = [Move(0, int(placement.map[slot]), slot, target * n + slot % n) for target, slot in slots]
        _, spoilt = self._exchange(group, moves, {move: move.target % n for move in moves})
        for row in rows:
            self._records[0].write(row, self._buffer[row])
        self._put(self._lay(0, 0, placement.map, 0, rows), placement.version)
        return spoilt

    def _stage(self, group: Group, maps: Mapping[int, np.ndarray]) -> tuple[list[_Layer], int, list[Move]]:
        """Layers that are ready, bytes that came from other ranks, and of what came that which was spoilt."""
        old = {number: self._mixtures[number].placement.map for number in maps}
        moves = find_moves(old, maps, self._slots_per_rank)
        mine = [move for move in moves if self._rank_of(move.target) == self._along.place]
        places = {move: place for place, move in enumerate(mine)}  # in the buffer; moves of a layer stand together
        for move in mine:
            if self._rank_of(move.source) == self._along.place:
                self._write(move, self._buffer[places[move]])
        num_bytes, spoilt = self._exchange(group, moves, places)
        layers, first = [], 0
        for at, (number, map) in enumerate(sorted(maps.items())):
            rows = [move.target % self._slots_per_rank for move in mine if move.layer == number]
            layers.append(self._lay(at, number, map, first, rows))
            first += len(rows)
        return layers, num_bytes, spoilt

    def _lay(self, at: int, number: int, map: np.ndarray, first: int, rows: list[int]) -> _Layer:
        """The `at`-th layer that is laid ready, whose records stand in the buffer from `first` on, for these rows."""
        table, here = self._tables[at], slice(first, first + len(rows))
        table.copy_(self._mixtures[number].placement.table(map))
        self._told_rows[here] = torch.tensor(rows, dtype=torch.int64)
        self._rows[here].copy_(self._told_rows[here], non_blocking=True)
        return _Layer(number, map, table, self._buffer[here], self._rows[here])

    def _put(self, layer: _Layer, version: int) -> None:
        """In force for what the current stream does next."""
        self._records[layer.number].read(layer.records, layer.rows)
        self._mixtures[layer.number].placement.rewrite(layer.map, version, layer.table)

    def _exchange(self, group: Group, moves: list[Move], places: Mapping[Move, int]) -> tuple[int, list[Move]]:
        """In chunks that all ranks cut alike: a rank's n-th expert comes in chunk n // self._chunk. A chunk that came spoilt does not end
        it, since others wait for the next. Bytes that came, and what was spoilt."""
        chunks: dict[int, list[Move]] = {}
        counts = [0] * self._along.size
        for move in moves:
            target = self._rank_of(move.target)
            if self._rank_of(move.source) != target:
                chunks.setdefault(counts[target] // self._chunk, []).append(move)
                counts[target] += 1
        spoilt = [move for _, chunk in sorted(chunks.items()) for move in self._pass(group, chunk, places)]
        return counts[self._along.place] * self._buffer.shape[1], spoilt

    def _pass(self, group: Group, chunk: list[Move], places: Mapping[Move, int]) -> list[Move]:
        """One chunk; what of it came spoilt."""
        place, counts = self._along.place, np.zeros((self._along.size, self._along.size), int)
        for move in chunk:
            counts[self._rank_of(move.source), self._rank_of(move.target)] += 1
        sent = sorted((move for move in chunk if self._rank_of(move.source) == place), key=lambda move: self._rank_of(move.target))
        due = sorted((move for move in chunk if self._rank_of(move.target) == place), key=lambda move: self._rank_of(move.source))
        out, came = self._sent[: len(sent)], self._came[: len(due)]
        for move, record in zip(sent, out, strict=True):
            self._write(move, record)
        if sent:
            self._seals.put(out, [_canary(move) for move in sent])
        self._carry(group, out, came, counts)
        for move, record in zip(due, came, strict=True):
            self._buffer[places[move]] = record
        spoilt = self._seals.spoilt(came, [_canary(move) for move in due]) if due else []
        return [move for move, bad in zip(due, spoilt, strict=True) if bad]

    def _carry(self, group: Group, out: torch.Tensor, came: torch.Tensor, counts: np.ndarray) -> None:
        """Records `out` by target, `came` by source; counts [source, target]."""
        place, sources = self._along.place, self._sources
        if sources is None:
            came.copy_(group.all_to_all(out.cpu(), counts[place].tolist(), counts[:, place].tolist()))
            return
        self._wait()
        _agree(group, len(counts), True)  # all that is sent is there
        at = 0
        for source, first, n in zip(sources, counts[:, :place].sum(axis=1), counts[:, place], strict=True):
            came[at : at + n] = source[first : first + n]
            at += n
        self._wait()
        _agree(group, len(counts), True)  # and may be overwritten

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _write(self, move: Move, record: torch.Tensor) -> None:
        self._records[move.layer].write(move.source % self._slots_per_rank, record)

    def _bytes(self, num_records: int, size: int) -> torch.Tensor:
        return torch.zeros(num_records, size, dtype=torch.uint8, device=self._device)

    def _rank_of(self, slot: int) -> int:
        return slot // self._slots_per_rank


def _canary(move: Move) -> int:
    return (move.layer + 1) << 32 | move.expert


def _agree(group: Group, size: int, said: bool) -> bool:
    """Whether all of the group's processes say so; none goes on before all have come here."""
    return bool(group.all_to_all(torch.full((size, 1), said, dtype=torch.uint8), [1] * size, [1] * size).all())


def _by_way_of(group: Group, size: int) -> Exchange:
    """What is told by the group's processes, which all say something under a name before they go on to the next."""

    def exchange(_: str, said: bytes) -> list[bytes]:
        lengths = group.all_to_all(torch.full((size,), len(said)), [1] * size, [1] * size).tolist()
        if not any(lengths):
            return [b""] * size
        told = group.all_to_all(torch.tensor(list(said * size), dtype=torch.uint8), [len(said)] * size, lengths)
        return [bytes(each.tolist()) for each in told.split(lengths)]

    return exchange
