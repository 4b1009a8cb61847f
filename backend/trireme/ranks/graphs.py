"""Graphs: decode steps captured once and launched whole, since a small step costs a GPU less time than Python needs to launch it.

One graph for each bucket of sequences, number of rows of a sequence (a token, or a token and drafts) and regime, all in one memory
pool: they run one after another. A step's numbers are copied into a graph's buffers on the stream that replays it, so that steps in
flight share them: a copy waits for the replay before it.

Graphs that hold collectives belong to an epoch, as its groups do: every rank of a stage captures the same ones in the same order.
Others are captured once.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch

from trireme.core.batch import Batch, Items
from trireme.core.settings import Settings
from trireme.core.step import PAGE, Regime
from trireme.models.decoder import Computed, Decoder
from trireme.parallel.comm import wait_for_device
from trireme.parallel.deal import Deal
from trireme.ranks.regimes import measures_sp
from trireme.ranks.rows import Rows
from trireme.ranks.staging import upload

Fill = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # tokens int64 [N], their slots int64 [N] -> tokens, none of them FED


class Recording(Protocol):
    """Launches that were captured."""

    def replay(self) -> None: ...

    def reset(self) -> None:
        """It holds nothing any more."""
        ...


class Record(Protocol):
    """Captures what a function launches. Nothing of it is computed before the first replay."""

    def __call__(self, compute: Callable[[], None]) -> Recording: ...

    def in_pieces(self, compute: Callable[[Callable[[], None]], None]) -> Sequence[Recording]:
        """Likewise, of what is launched before, between and after calls of a function that it is given."""
        ...


class Shape(NamedTuple):
    """What a graph computes."""

    items: int  # sequences, at the most
    width: int  # rows of each, at the most
    regime: Regime

    @property
    def num_rows(self) -> int:
        return self.items * self.width


def buckets(max_num_seqs: int) -> list[int]:
    """Numbers of sequences that are captured: 1, 2, 4, 8, 16, 24, 32, then by 16; the last one is max_num_seqs."""
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, max_num_seqs, 16)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def shapes(settings: Settings, decoder: Decoder) -> list[Shape]:
    """Those of every decode step that a front may ask for, largest first: with one row a sequence, or while drafts are made with
    up to num_tokens more."""
    found, sp_from = [], None if measures_sp(settings, decoder.build.device) else settings.sp_from
    for width in range(1, 2 + decoder.build.plan.mtp):
        most = settings.max_num_seqs if width == 1 else min(settings.max_num_seqs, settings.mtp.max_batch_size)
        sizes = buckets(most)
        for below, items in zip([0, *sizes], sizes, strict=False):
            rows = range(below + width, items * width + 1)  # one sequence of width rows, others of one; all of width
            named = dict.fromkeys(Regime.of([each], sp_from, 1) for each in rows)
            found += [Shape(items, width, regime) for regime in named if decoder.has_whole_edges(regime)]
    return sorted(found, key=lambda shape: shape.num_rows, reverse=True)


def why_none(settings: Settings, decoder: Decoder, device: torch.device) -> str | None:
    """Why steps are launched one kernel at a time, or None."""
    if device.type == "cpu":
        return "a CPU has none"
    if settings.enforce_eager:
        return "enforce_eager"
    if decoder.build.spec.num_experts and settings.experts == "dispatched":
        return "the host must know how many rows are dispatched"
    if decoder.capture_attention(1, 1) is None:
        return "its attention cannot be captured"
    if decoder.capture_states(1, 1) is None:
        return "its states cannot be captured"
    if not shapes(settings, decoder):
        return "sequence parallelism cuts the rows between stages in every step"
    return None


class Recorder:
    """Record, on a GPU. `give_up`: whether the epoch was given up, which frees nobody who waits for the device."""

    def __init__(self, device: torch.device, give_up: Callable[[], bool], limit_s: float):
        self._device, self._give_up, self._limit_s = device, give_up, limit_s
        self._pool = torch.cuda.graph_pool_handle()
        # Its own: torch's is of the GPU that this process had first, and a worker of a pool may have another one by now.
        self._stream = torch.cuda.Stream(device)

    def __call__(self, compute: Callable[[], None]) -> Recording:
        """LinkLost where another rank does not come."""
        [graph] = self.in_pieces(lambda cut: compute())
        return graph

    def in_pieces(self, compute: Callable[[Callable[[], None]], None]) -> Sequence[Recording]:
        """LinkLost where another rank does not come."""
        compute(lambda: None)  # what is compiled, chosen or connected at its first use cannot be captured
        wait_for_device(self._device, self._limit_s, self._give_up)
        graphs: list[Recording] = []
        try:
            with ExitStack() as under_way:

                def begin() -> None:
                    under_way.close()  # what is captured so far is whole
                    graph = torch.cuda.CUDAGraph()
                    graphs.append(graph)
                    # only this thread's calls are looked at: NCCL's watchdogs ask for events meanwhile
                    under_way.enter_context(
                        torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
                    )

                begin()
                compute(begin)
        except BaseException:
            for graph in graphs:
                graph.reset()
            raise
        return graphs


class Graphs:
    """Steps in which every sequence decodes one token, or verifies drafts after one. Rows that fill up a bucket write to a page that
    nobody reads, and change no states."""

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[tuple[torch.Tensor, ...]],
        shapes: Iterable[Shape],
        *,
        fill: Fill,
        scratch_page: int,
        max_pages: int,  # of one sequence
    ):
        self._all = [Graph(decoder, caches, shape, fill, scratch_page, max_pages) for shape in shapes]
        self._by_size: dict[tuple[int, Regime], list[Graph]] = defaultdict(list)
        for graph in reversed(self._all):
            self._by_size[graph.shape.width, graph.shape.regime].append(graph)
        self._counts_loads = decoder.build.plan.eplb and bool(decoder.mixtures)
        self._told = "not captured"

    def __iter__(self) -> Iterator[Graph]:
        return iter(self._all)

    def __str__(self) -> str:
        shapes = [graph.shape for graph in self._all]
        most, width = max(shape.items for shape in shapes), max(shape.width for shape in shapes)
        return f"{len(shapes)} of 1 to {most} sequences{f' and 1 to {width} rows of each' if width > 1 else ''}, {self._told}"

    def warm(self) -> None:
        """Once before any capture: kernels are compiled."""
        for graph in self._all:
            graph.compute()
            graph.drop()

    def capture(self, record: Record) -> None:
        """Every rank of a stage calls it, or none."""
        with self._measured():
            try:
                for graph in self._all:
                    graph.capture(record)
            except BaseException:
                self.drop()  # here, since who handles the error keeps this frame, and with it what an abort of groups would wait for
                raise

    def drop(self) -> None:
        """Before the groups that they hold are closed."""
        for graph in self._all:
            graph.drop()

    def find(self, rows: Rows, regime: Regime) -> Graph | None:
        """The least graph that computes these rows, all of which are sampled; None where none does."""
        if not len(rows.slots) or not (rows.samples == rows.counts).all():
            return None
        width = int(rows.counts.max())
        if self._counts_loads and rows.counts.min() < width:  # padding amid the rows would be counted
            return None
        graphs = self._by_size.get((width, regime), [])
        at = bisect_left(graphs, len(rows.slots), key=lambda graph: graph.shape.items)
        return graphs[at] if at < len(graphs) and graphs[at].is_captured else None

    @contextmanager
    def _measured(self) -> Iterator[None]:
        began, on_gpu = time.perf_counter(), torch.cuda.is_available()
        free = torch.cuda.mem_get_info()[0] if on_gpu else 0
        yield
        took = free - torch.cuda.mem_get_info()[0] if on_gpu else 0
        self._told = f"captured in {time.perf_counter() - began:.1f} s, {took / (1 << 30):.2f} GiB"


class Numbers:
    """What graphs read of a step's rows, where it stays on the device, filled up with rows of nobody, that go to a page which nobody
    reads."""

    def __init__(self, num_rows: int, scratch_page: int, device: torch.device):
        padding = np.array([[0], [0], [0], [scratch_page * PAGE], [0]])
        self._padding = np.repeat(padding, num_rows, axis=1)
        numbers = self._numbers = torch.from_numpy(self._padding.copy()).to(device)
        self.tokens, self.slots, self.positions, self.pages, more = numbers  # int64 [rows] each, FED among the tokens
        self.num_real = more[:1]

    def take(self, rows: Rows, places: np.ndarray) -> None:
        """From now on those of a step, whose rows stand at `places`, int64 [T], for what is launched from now on."""
        host = torch.empty(self._numbers.shape, dtype=torch.int64, pin_memory=self._numbers.is_cuda)
        numbers = host.numpy()
        numbers[:] = self._padding
        numbers[:4, places] = rows.tokens, rows.owners, rows.positions, rows.pages
        numbers[4, 0] = places[-1] + 1  # padding amid the rows is computed like them
        self._numbers.copy_(host, non_blocking=True)


class Graph:
    """Of one shape. Each sequence has `width` rows, of which those behind its own are padding."""

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[tuple[torch.Tensor, ...]],
        shape: Shape,
        fill: Fill,
        scratch_page: int,
        max_pages: int,
    ):
        build, (items, width, regime) = decoder.build, shape
        self.shape = shape
        self._decoder, self._caches, self._fill = decoder, caches, fill
        self._counts = np.full(items, width, np.int32)
        self.deal = Deal(build.plan, build.rank, self._counts, regime, build.device)
        self._numbers = Numbers(shape.num_rows, scratch_page, build.device)
        num_edge_rows, hidden = decoder.num_edge_rows(self.deal), build.spec.hidden
        self._edge = None if build.first else torch.zeros(num_edge_rows, hidden, dtype=build.dtype, device=build.device)
        attends = decoder.capture_attention(shape.num_rows, max_pages)
        advances = decoder.capture_states(items, width)
        assert attends is not None and advances is not None, "asked before"
        self._attends, self._advances = attends, advances
        for attend in attends.values():
            attend.plan(np.ones(shape.num_rows, np.int32), np.zeros((shape.num_rows, 1), np.int32))
        self._recording: Recording | None = None
        self._result: Computed | None = None

    @property
    def is_captured(self) -> bool:
        return self._recording is not None

    def compute(self) -> None:
        """The launches of a step, from buffers that stay where they are."""
        self._result = None  # logits are large
        tokens = self._numbers.tokens
        batch = self.batch(self._fill(tokens, self._numbers.slots) if self._decoder.build.first else tokens)
        self._result = self._decoder.forward(batch, self.deal, self._edge)

    def batch(self, tokens: torch.Tensor) -> Batch:
        """The step's rows with tokens [rows] that are not in its numbers."""
        numbers, none, width = self._numbers, np.zeros_like(self._counts), self.shape.width
        firsts = numbers.positions[::width]
        return Batch(
            tokens=tokens,
            positions=numbers.positions,
            pages=numbers.pages,
            attention={window: attend.run for window, attend in self._attends.items()},
            shared=None,
            caches=self._caches,
            items=Items(
                numbers.slots[::width].contiguous(),
                firsts == 0,
                self._counts,
                none,
                none > 0,
                {op: advance.run for op, advance in self._advances.items()},
            ),
            num_rows=numbers.num_real,
        )

    @property
    def tokens(self) -> torch.Tensor:
        """Of the step's rows, FED among them: int64 [rows]."""
        return self._numbers.tokens

    @property
    def normed(self) -> torch.Tensor:
        """As Computed has it, [rows, H]."""
        assert self._result is not None and self._result.normed is not None
        return self._result.normed

    def places(self, rows: Rows) -> np.ndarray:
        """Where a step's rows stand among the graph's: int64 [T]."""
        return np.repeat(np.arange(len(rows.slots)) * self.shape.width - rows.firsts, rows.counts) + np.arange(len(rows.tokens))

    def there(self, places: np.ndarray, num_items: int) -> slice | torch.Tensor:
        """The same to index a tensor with."""
        if len(places) == num_items * self.shape.width:
            return slice(0, len(places))
        return upload([places], self._decoder.build.device)[0]

    def capture(self, record: Record) -> None:
        self._recording = record(self.compute)
        if self._decoder.build.last and self._result is not None and self._result.rows.is_cuda:
            self._result = self._result._replace(rows=borrowed(self._result.rows))  # logits are large

    def drop(self) -> None:
        if self._recording is not None:
            self._recording.reset()
        self._recording = self._result = None

    def run(self, rows: Rows, page_table: np.ndarray, received: torch.Tensor | None) -> Computed:
        """Rows that `find` gave this graph for; page_table int32 [I, P], of their items -> what the decoder's forward gives. It is
        overwritten by the next run."""
        assert self._recording is not None, "captured before"
        width, num_items, places = self.shape.width, len(rows.slots), self.places(rows)
        at = self.there(places, num_items)
        self._numbers.take(rows, places)
        ends = np.ones(num_items * width, np.int32)
        ends[places] = rows.positions + 1
        for attend in self._attends.values():
            attend.plan(ends, np.repeat(page_table, width, axis=0))
        for advance in self._advances.values():
            advance.plan(rows.counts, rows.replays, rows.holds)
        if self._edge is not None and received is not None:
            self._edge[at] = received
        self._recording.replay()
        assert self._result is not None
        result, normed, _ = self._result
        if not self._decoder.build.last:
            return Computed(result[at].clone())  # a link may still send the last one
        return Computed(result[at], None if normed is None else normed[at])


class _Borrowed:
    """A tensor's place in memory, as integers of its numbers' size."""

    def __init__(self, x: torch.Tensor):
        strides = tuple(stride * x.itemsize for stride in x.stride())
        place = {"shape": tuple(x.shape), "strides": strides, "typestr": f"<i{x.itemsize}", "data": (x.data_ptr(), False), "version": 3}
        self.__cuda_array_interface__ = place


def borrowed(x: torch.Tensor) -> torch.Tensor:
    """x without owning its memory, so that what graphs hand on lies in one place: each is read before the next graph runs. On a CPU
    x itself."""
    return torch.as_tensor(_Borrowed(x), device=x.device).view(x.dtype) if x.is_cuda else x
