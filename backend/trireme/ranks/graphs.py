"""Graphs: decode steps captured once and launched whole, since a small step costs a GPU less time than Python needs to launch it.

One graph for each bucket of rows, all in one memory pool: they run one after another. A step's numbers are copied into a
graph's buffers on the stream that replays it, so that steps in flight share them: a copy waits for the replay before it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from trireme.core.batch import Batch, Items
from trireme.core.settings import Settings
from trireme.core.step import PAGE, Regime
from trireme.models.decoder import Computed, Decoder
from trireme.parallel.deal import Deal
from trireme.ranks.rows import Rows

Fill = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # tokens int64 [N], their slots int64 [N] -> tokens, none of them FED


def buckets(max_num_seqs: int) -> list[int]:
    """Numbers of rows that are captured: 1, 2, 4, 8, 16, 24, 32, then by 16; the last one is max_num_seqs."""
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, max_num_seqs, 16)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def why_none(settings: Settings, decoder: Decoder, device: torch.device) -> str | None:
    """Why steps are launched one kernel at a time, or None."""
    if device.type == "cpu":
        return "a CPU has none"
    if settings.enforce_eager:
        return "enforce_eager"
    if settings.ranks_per_stage > 1:
        return "its collectives belong to an epoch"
    if decoder.build.spec.num_experts and settings.experts == "dispatched":
        return "the host must know how many rows are dispatched"
    if decoder.capture_attention(1, 1) is None:
        return "its attention cannot be captured"
    if decoder.capture_states(1) is None:
        return "its states cannot be captured"
    return None


class Graphs:
    """Steps in which every sequence decodes one token, also after drafts that stand. Rows that fill up a bucket write to a page that
    nobody reads, and change no states."""

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[tuple[torch.Tensor, ...]],
        sizes: Sequence[int],
        *,
        fill: Fill,
        scratch_page: int,
        max_pages: int,  # of one sequence
    ):
        began, free = time.perf_counter(), torch.cuda.mem_get_info()[0]
        pool = torch.cuda.graph_pool_handle()
        self._sizes = sorted(sizes)
        graphs = {size: _Graph(decoder, caches, size, fill, scratch_page, max_pages, pool) for size in reversed(self._sizes)}
        self._graphs = [graphs[size] for size in self._sizes]
        self.seconds, self.num_bytes = time.perf_counter() - began, free - torch.cuda.mem_get_info()[0]

    def __str__(self) -> str:
        return f"{len(self._graphs)} of 1 to {self._sizes[-1]} rows, captured in {self.seconds:.1f} s, {self.num_bytes / (1 << 30):.2f} GiB"

    def run(self, rows: Rows, page_table: np.ndarray, received: torch.Tensor | None) -> Computed:
        """Rows of decodes only; page_table int32 [I, P], of their items -> what the decoder's forward gives. It is overwritten by
        the next run."""
        return self._graphs[bisect_left(self._sizes, len(rows.slots))].run(rows, page_table, received)


class _Graph:
    """Of `size` rows."""

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[tuple[torch.Tensor, ...]],
        size: int,
        fill: Fill,
        scratch_page: int,
        max_pages: int,
        pool: Any,
    ):
        build, one = decoder.build, np.ones(size, np.int32)
        deal = Deal(build.plan, build.rank, one, Regime(), build.device)
        padding = np.array([[0], [0], [0], [scratch_page * PAGE], [0]])
        self._padding = np.repeat(padding, size, axis=1)  # int64 [5, size]: tokens, slots, positions, pages; first of the last, how many
        self._numbers = torch.from_numpy(self._padding).to(build.device)
        self._edge = (
            None if build.first else torch.zeros(decoder.num_edge_rows(deal), build.spec.hidden, dtype=build.dtype, device=build.device)
        )
        attends = decoder.capture_attention(size, max_pages)
        advances = decoder.capture_states(size)
        assert attends is not None and advances is not None, "asked before"
        self._attends, self._advances = attends, advances
        for attend in attends.values():
            attend.plan(one, np.zeros((size, 1), np.int32))
        zero = np.zeros(size, np.int32)
        self._head_rows = torch.arange(size, device=build.device)  # kept, as all that a graph reads

        def forward() -> Computed:
            tokens, slots, positions, pages, num_rows = self._numbers
            batch = Batch(
                tokens=fill(tokens, slots) if build.first else tokens,
                positions=positions,
                pages=pages,
                attention={window: attend.run for window, attend in attends.items()},
                shared=None,
                caches=caches,
                head_rows=self._head_rows,
                items=Items(slots, positions == 0, one, zero, zero > 0, {op: advance.run for op, advance in advances.items()}),
                num_rows=num_rows[:1],
            )
            return decoder.forward(batch, deal, self._edge)

        forward()  # what is compiled or chosen at its first use cannot be captured
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            result = forward()
        self._result = result._replace(rows=_borrowed(result.rows)) if build.last else result

    def run(self, rows: Rows, page_table: np.ndarray, received: torch.Tensor | None) -> Computed:
        num_rows = len(rows.slots)
        host = torch.empty(self._numbers.shape, dtype=torch.int64, pin_memory=True)
        numbers = host.numpy()
        numbers[:] = self._padding
        numbers[:4, :num_rows] = rows.tokens, rows.slots, rows.positions, rows.pages
        numbers[4, 0] = num_rows
        self._numbers.copy_(host, non_blocking=True)
        for attend in self._attends.values():
            attend.plan(rows.ends, page_table)
        for advance in self._advances.values():
            advance.plan(rows.counts, rows.replays, rows.holds)
        if self._edge is not None and received is not None:
            self._edge[:num_rows].copy_(received)
        self._graph.replay()
        result, normed = self._result.rows[:num_rows], self._result.normed
        if normed is not None:
            return Computed(result, normed[:num_rows])
        return Computed(result.clone())  # a link may still send the last one


class _Borrowed:
    """A float32 tensor's place in memory."""

    def __init__(self, x: torch.Tensor):
        self.__cuda_array_interface__ = {"shape": tuple(x.shape), "typestr": "<f4", "data": (x.data_ptr(), False), "version": 3}


def _borrowed(x: torch.Tensor) -> torch.Tensor:
    """x without owning its memory, so that the graphs' logits, which are large, lie in one place: each is read before the next
    graph runs."""
    assert x.dtype == torch.float32 and x.is_contiguous()
    return torch.as_tensor(_Borrowed(x), device=x.device)
