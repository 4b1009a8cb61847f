"""Chains: what the drafter does behind a step that a graph computed, captured too: the head's pass over the step's rows with the first
draft, and one more draft, which is replayed for each. What they compute is the drafter's to define."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from trireme.core.batch import Batch
from trireme.core.step import PAGE, Regime
from trireme.models.decoder import Decoder
from trireme.parallel.deal import Deal
from trireme.ranks.drafter import Drafter
from trireme.ranks.graphs import Graph, Graphs, Record, Recording
from trireme.ranks.rows import Rows
from trireme.ranks.staging import upload


class Chains:
    """One chain for each graph of few enough sequences: `most_items`, as none are drafted above."""

    def __init__(
        self,
        decoder: Decoder,
        drafter: Drafter,
        caches: Sequence[tuple[torch.Tensor, ...]],
        graphs: Graphs,
        *,
        most_items: int,
        scratch_page: int,
        max_pages: int,  # of one sequence
    ):
        few = [graph for graph in graphs if graph.shape.items <= most_items]
        self._by_graph = {graph: _Chain(decoder, drafter, caches, graph, scratch_page, max_pages) for graph in few}

    def warm(self) -> None:
        """As Graphs.warm."""
        for graph, chain in self._by_graph.items():
            graph.compute()
            chain.warm()
            graph.drop()

    def capture(self, record: Record) -> None:
        """Once the graphs are captured."""
        try:
            for chain in self._by_graph.values():
                chain.capture(record)
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """As Graphs.drop."""
        for chain in self._by_graph.values():
            chain.drop()

    def draft(self, graph: Graph, rows: Rows, sampled: torch.Tensor, num_drafts: int) -> torch.Tensor | None:
        """What Drafter.draft gives, int32 [I, num_drafts], of a step that `graph` computed just now; None where there is no chain."""
        chain = self._by_graph.get(graph)
        return None if chain is None else chain.draft(rows, sampled, num_drafts).to(torch.int32)


class _Chain:
    """Of one graph, whose buffers it reads."""

    def __init__(
        self,
        decoder: Decoder,
        drafter: Drafter,
        caches: Sequence[tuple[torch.Tensor, ...]],
        graph: Graph,
        scratch_page: int,
        max_pages: int,
    ):
        build, head, (items, width, _) = decoder.build, decoder.mtp, graph.shape
        assert head is not None, "a stage whose head drafts"
        self._graph, self._head, self._drafter, self._caches = graph, head, drafter, caches
        device, self._most = build.device, build.plan.mtp
        self._last_position = build.spec.max_position_embeddings - 1
        self._deal = Deal(build.plan, build.rank, np.ones(items, np.int32), Regime(), device)
        # A drafted row stands up to so many places behind its item's first: int64 [items, places], where its key and value go
        places = width + self._most - 1
        self._nothing = np.concatenate([np.zeros(1 + items), np.full(items * places, scratch_page * PAGE)]).astype(np.int64)
        self._numbers = torch.from_numpy(self._nothing.copy()).to(device)
        self._num_items, self._counts = self._numbers[:1], self._numbers[1 : 1 + items]
        self._pages = self._numbers[1 + items :].view(items, places)
        self._begins, self._row = torch.arange(items, device=device) * width, torch.arange(width - 1, device=device)
        # Attention is planned once for all drafts of a step: of each place for as many keys as there are up to it.
        self._owners = torch.arange(items, device=device).repeat_interleave(places)
        self._first_lens = torch.arange(items, device=device) * places

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._sampled, self._standing, self._place, self._position, self._draft = (
            zeros(num) for num in (items * width, items, items, items, items)
        )
        self._passed = zeros(items, build.spec.hidden, dtype=build.dtype)
        attends = decoder.capture_attention(items * places, max_pages + 1)
        assert attends is not None, "asked before"
        self._attends = attends
        for attend in attends.values():
            attend.plan(np.ones(items * places, np.int32), np.zeros((items * places, 1), np.int32))
        self._recordings: list[Recording] = []

    def warm(self) -> None:
        for launches in self._launches():
            launches()

    def capture(self, record: Record) -> None:
        for launches in self._launches():
            self._recordings.append(record(launches))

    def _launches(self) -> list[Callable[[], None]]:
        """What is replayed. To go on is computed after a pass, so that places are those of a step; with one draft it has none."""
        return [self._pass, self._go_on] if self._most > 1 else [self._pass]

    def drop(self) -> None:
        for recording in self._recordings:
            recording.reset()
        self._recordings = []

    def draft(self, rows: Rows, sampled: torch.Tensor, num_drafts: int) -> torch.Tensor:
        num_items, num_places = len(rows.slots), self._pages.shape[1]
        table = self._drafter.spare_table(rows.slots, rows.ends)
        numbers = self._nothing.copy()
        numbers[0], numbers[1 : 1 + num_items] = num_items, rows.counts
        positions = rows.starts[:, None] + np.arange(num_places)
        pages = np.take_along_axis(table, np.minimum(positions // PAGE, table.shape[1] - 1), axis=1).astype(np.int64)
        of_items = numbers[1 + len(self._counts) :].reshape(self._pages.shape)
        of_items[:num_items] = pages * PAGE + positions % PAGE
        [there] = upload([numbers], self._numbers.device)
        self._numbers.copy_(there)
        places = self._graph.places(rows)
        self._sampled[self._graph.there(places, num_items)] = sampled
        replay, *more = self._recordings
        replay.replay()
        drafts = [self._draft[:num_items].clone()]
        if num_drafts > 1:
            ends = np.minimum(positions + 1, table.shape[1] * PAGE).astype(np.int32).ravel()  # no chain comes to what lies beyond
            for attend in self._attends.values():
                attend.plan(ends, np.repeat(table, num_places, axis=0))
        for _ in range(1, num_drafts):
            more[0].replay()
            drafts.append(self._draft[:num_items].clone())
        return torch.stack(drafts, dim=1)

    def _pass(self) -> None:
        """The head's pass over all rows, each with the token sampled at it; of each item the row that stands, and its draft."""
        graph, width = self._graph, self._graph.shape.width
        normed = graph.normed
        batch = graph.batch(self._sampled)
        passed = self._head(normed, batch, graph.deal)
        drafts = graph.tokens.view(-1, width)[:, 1:]
        stands = (self._sampled.view(-1, width)[:, :-1] == drafts) & (self._row < self._counts[:, None] - 1)
        self._place.copy_(stands.long().cumprod(dim=1).sum(dim=1))
        self._standing.copy_(self._begins + self._place)
        self._position.copy_(batch.positions[self._standing])
        self._take(passed.index_select(0, self._standing))

    def _go_on(self) -> None:
        """A row more behind each item's last one, with the last draft."""
        self._place += 1
        self._position += 1
        batch = Batch(
            tokens=self._draft,
            positions=self._position.clamp(max=self._last_position),
            pages=self._pages.gather(1, self._place[:, None])[:, 0],
            attention={window: partial(self._attend, attend.run) for window, attend in self._attends.items()},
            shared=None,
            caches=self._caches,
            num_rows=self._num_items,
        )
        self._take(self._head(self._passed, batch, self._deal))

    def _take(self, passed: torch.Tensor) -> None:
        self._draft.copy_(self._drafter.best(passed))
        self._passed.copy_(passed)

    def _attend(self, attend, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return attend(q[self._owners], keys, values)[self._first_lens + self._place]
