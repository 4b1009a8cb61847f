"""Runner: Step -> Batch -> Decoder -> tokens, in one rank. Owns the caches, the page tables and the sampler rows; decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from trireme.core.batch import Attend, Batch, Items
from trireme.core.control import Answer
from trireme.core.devices import steps_in_flight
from trireme.core.log import logger
from trireme.core.request import Logprobs, Sampling
from trireme.core.settings import Settings
from trireme.core.step import PAGE, Clock, Open, Outcome, Regime, Step, array, ints
from trireme.layers.block import PerToken
from trireme.models.decoder import Computed, Decoder
from trireme.parallel.context import Shared
from trireme.parallel.deal import Deal
from trireme.parallel.link import ExpectedTokens, Link
from trireme.parallel.rehearsal import rehearse
from trireme.parallel.relocation import Unprepared
from trireme.parallel.vocabulary import CutLogits
from trireme.ranks.chains import Chains
from trireme.ranks.drafter import Drafter
from trireme.ranks.fed import FedTokens
from trireme.ranks.graphs import Graph, Graphs, Record, Recorder, shapes, why_none
from trireme.ranks.logprobs import CHUNK, Prompts, Stretch
from trireme.ranks.memory import Sizes, check_states, find_room, num_pages, num_snapshots, stock, unstock
from trireme.ranks.mixtures import Mixtures
from trireme.ranks.pieces import InPieces, Pieces, piece_sizes
from trireme.ranks.regimes import find_sp_from, largest_steps, spread
from trireme.ranks.routed import asked_rows, tell_routed
from trireme.ranks.rows import Rows, lay_out
from trireme.ranks.sampler import Sampled, Sampler
from trireme.ranks.settle import Brought, Own, Settle, ToldTokens
from trireme.ranks.staging import download, upload
from trireme.ranks.states import States
from trireme.ranks.stopwatch import Stopwatch
from trireme.ranks.trials import DRAWN, GREEDY, SAMPLINGS, Trial, arrivals, tiles, trials
from trireme_kernels.choose import Choices

# Rows of a step from which on it pays to plan attention for those alone whose logits are asked for. On an H100 a plan takes the host 0.35
# ms and 6 us for each (FlashInfer), beside a device that is still busy then; it saves the device some 0.1 us for each other row.
_MANY = 2048


class Pending(NamedTuple):
    """An order that was carried out as far as the host can: a step on a GPU was launched."""

    late: bool  # whether `finish` waits for a device
    finish: Callable[[], tuple[Answer, np.ndarray | None]]  # the answer, rows that go with it (tensor link)
    where: Callable[[], str] = lambda: "it was not begun"  # of one that is late: what it is at, as a clause


class Runner:
    """One rank's computing. `begin` a link, `run` steps in order, `leave`."""

    def __init__(
        self,
        decoder: Decoder,
        settings: Settings,
        stage: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        hidden: int,
        vocab_size: int,
        max_model_len: int,
        choices: Choices,
        progress: Callable[[str], None],
    ):
        self.hidden, self.dtype = hidden, dtype
        self.collectives = decoder.build.collectives
        self._decoder, self._settings, self._stage, self._device = decoder, settings, stage, device
        self._log = logger(f"stage_{stage} rank {decoder.build.rank}")
        self._is_first, self._is_last = stage == 0, stage == settings.num_stages - 1
        self._page_table = np.zeros((settings.max_num_seqs, -(-max_model_len // PAGE)), dtype=np.int32)
        self._sampler = Sampler(
            settings.max_num_seqs, vocab_size, device, choices("sample", vocab=vocab_size), choices("penalise", vocab=vocab_size)
        )
        self._vocab_size, self._along_vocabulary = vocab_size, self.collectives.along("tp")
        self._prompts = Prompts()
        self._link: Link | None = None
        self._mixtures = Mixtures(decoder, settings) if decoder.mixtures and decoder.build.plan.eplb else None
        self._fed = FedTokens(settings.max_num_seqs, steps_in_flight(settings), device)
        self._settle = Settle(settings.max_num_seqs, decoder.build.plan.mtp, steps_in_flight(settings))
        self._aside = torch.cuda.Stream(device, priority=-1) if device.type != "cpu" else None  # for what settles steps
        self._watch: Stopwatch | None = None  # of the last step
        self._graphs: Graphs | None = None
        self._chains: Chains | None = None
        self._pieces: Pieces | None = None
        self._why_no_graphs = why_none(settings, decoder, device)
        self._make_room(max_model_len, progress)

    def make_way(self) -> None:
        """For the groups of an epoch, before they are formed."""
        unstock(self._device)

    @torch.inference_mode()
    def begin(self, link: Link, give_up: Callable[[], bool] = lambda: False, broken: Callable[[], bool] = lambda: False) -> None:
        """A new epoch: nothing is known of any sequence. Caches need no wiping, since no page is read before it is written. Graphs
        that hold collectives are captured, for which all ranks of the stage must come: LinkLost where they do not, or `give_up`
        says so. `broken`: whether the epoch is over, while it lasts."""
        self._link, self._watch, self._broken = link, None, broken
        if self._graphs is not None and self._graphs_are_of_epochs:
            self._capture(give_up)
            self._log.info("graphs: %s", self.graphs)
        if self._mixtures is not None and (told := self._mixtures.begin(give_up)):
            self._log.info("%s", told)
        settings = self._settings
        edge = settings.max_num_batched_tokens * self.hidden * self.dtype.itemsize if settings.num_stages > 1 else 0
        stock(self.room, steps_in_flight(settings) * edge, self._device)
        self._fed.clear()
        self._settle.clear()
        self._sampler.clear()
        self._prompts.clear()

    def find_sp_from(self, give_up: Callable[[], bool]) -> int | None:
        """Rows of a step from which sequence parallelism pays; None where that is not measured. In every epoch, by all ranks of the
        stage together: one that is new cannot measure it alone."""
        return find_sp_from(self._settings, self._decoder, give_up)

    def leave(self) -> None:
        """Close and drop the link and the groups, and everything on its way over them: only then are the other ends freed."""
        self.collectives.give_up()  # before anything that could wait for the device
        if self._graphs is not None and self._graphs_are_of_epochs:
            if self._chains is not None:
                self._chains.drop()
            if self._pieces is not None:
                self._pieces.drop()
            self._graphs.drop()  # first: the end of a group waits for the graphs that hold it
        if self._link is not None:
            self._link.close()
        self._link = None
        self.collectives.leave()
        self._fed.clear()
        self._settle.clear()

    @property
    def graphs(self) -> str:
        """Why there are none, or what they took."""
        if self._why_no_graphs:
            return self._why_no_graphs
        pieces = self._pieces or "no pieces: sequence parallelism is always on"
        return f"{self._graphs}; {pieces}{'; none for steps that tell experts' if self._decoder.mixtures else ''}"

    @property
    def _graphs_are_of_epochs(self) -> bool:
        return bool(self.collectives.spans)

    def _capture(self, give_up: Callable[[], bool]) -> None:
        assert self._graphs is not None
        record = self._recorder(give_up)
        if self._pieces is not None:  # the largest first, so that what others take of memory lies in theirs
            self._pieces.capture(record)
        self._graphs.capture(record)
        if self._chains is not None:
            self._chains.capture(record)

    def _recorder(self, give_up: Callable[[], bool]) -> Record:
        return Recorder(self._device, give_up, self._settings.step_timeout_s)

    @property
    def map_version(self) -> int:
        """Of the expert maps in force."""
        return self._mixtures.version if self._mixtures is not None else 0

    def prepare_maps(self, version: int, maps: Mapping[int, np.ndarray]) -> int:
        """Lay new expert maps ready, in a thread of its own while steps go on. The bytes that came from other ranks."""
        if self._mixtures is None:
            raise Unprepared("the loads of this stage's experts are not balanced: settings have no eplb, or the stage has no experts")
        return self._mixtures.prepare(version, maps)

    def settle_maps(self, version: int) -> None:
        """Before an epoch: have the maps that the whole stage has. MapLost where that cannot be."""
        if self._mixtures is not None:
            self._mixtures.settle(version)

    @property
    def _joined(self) -> Link:
        """The epoch's link. Nobody else keeps it, so that `leave` drops it."""
        assert self._link is not None, "a step runs in an epoch"
        return self._link

    @torch.inference_mode()
    def run(self, step: Step, carried: np.ndarray | None, waited_s: float) -> Pending:
        """`carried`: rows that came with the call (tensor link). A GPU is still computing when this returns."""
        if step.unsettled:
            began = time.perf_counter()
            step = self._settle.settle(step, self._broken)
            waited_s += time.perf_counter() - began
        watch = self._watch = Stopwatch(self._device, waited_s, self._watch)
        stamped = step.maps[self._stage] if step.maps else 0
        if self._mixtures is not None and stamped not in (0, self._mixtures.version):
            with watch.stalling():
                self._mixtures.commit(stamped)
        version = self.map_version
        rows = self._read(step)
        stretches = self._prompts.stretches(rows)
        deal = self._deal(rows, step.regime, stretches)
        with watch.receiving():
            received = self._receive(step, rows, deal, carried)

        self._states.restore(step.restores)
        batch, routed, recorded = None, bytes, bytes
        records = self._records(step)
        graph, pieces = None if stretches else self._find_graph(step, rows), None
        if graph is not None:
            computed = graph.run(rows, self._table_of(rows.slots, rows.ends), received)
        else:
            batch = self._batch(rows, deal, self._plan_attention(rows, deal), routed=[] if step.routed or records else None)
            pieces = self._find_pieces(step, rows)
            computed = self._decoder.forward(batch, deal, received) if pieces is None else pieces.run(rows, batch, deal, received)
            if batch.routed is not None:
                routed = tell_routed(self._decoder, deal, asked_rows(step, rows), batch.routed)
                recorded = tell_routed(self._decoder, deal, np.arange(step.num_rows if records else 0), batch.routed)
        if self._is_first and step.returns and len(rows.sampled):
            self._fed.owe(step.number, rows.owners[rows.sampled], rows.feeds, self._expect(step, rows))
        carries, read, report = None, Outcome, None
        if self._is_last:
            sampled = self._sample(step, rows, self._cut(computed.rows)) if len(rows.sampled) else None
            drafts = self._draft(step, rows, deal, batch, computed, sampled, graph)
            if step.settles and sampled is not None:
                self._tell(step, rows, sampled, drafts)
            read = self._describe(sampled, drafts, stretches, computed.unread)
        else:
            carries = self._joined.send(computed.rows)
        self._states.save(step.saves)
        if self._mixtures is not None and step.counts_loads:
            report = self._mixtures.report(eager=batch is not None and pieces is None)
        watch.stop()

        def finish() -> tuple[Answer, np.ndarray | None]:
            watch.wait()
            outcome = read(step.epoch, step.number, self._stage, clock=watch.clock())
            loads, told, every = report() if report is not None else b"", routed(), recorded()
            if loads or told or every or version or watch.stalled_s():
                more = {"map_ready": version, "stalled_s": watch.stalled_s(), "recorded": every}
                outcome = msgspec.structs.replace(outcome, routed_experts=told, loads=loads, **more)
            return outcome, carries

        link = self._joined.name

        def where() -> str:
            return {
                "queued": "the device is at a step before it",
                "receiving": f"what {link} brings has not come",
                "computing": f"the device computes, or waits for a rank of its own stage, or for {link} to take rows",
                "done": "it was computed",
            }[watch.phase()]

        return Pending(self._device.type != "cpu", finish, where)

    def _find_graph(self, step: Step, rows: Rows) -> Graph | None:
        return None if self._graphs is None or self._tells(step) else self._graphs.find(rows, step.regime)

    def _find_pieces(self, step: Step, rows: Rows) -> InPieces | None:
        return None if self._pieces is None or self._tells(step) else self._pieces.find(rows, step.regime)

    def _tells(self, step: Step) -> bool:
        """Whether experts of its rows are told."""
        return bool(step.routed) or self._records(step)

    def _records(self, step: Step) -> bool:
        """Whether the experts of every row are told: the same on all ranks of the stage, so that they take a graph or none together."""
        return step.records and self._mixtures is not None

    def _read(self, step: Step) -> Rows:
        """What the step changes, then its rows."""
        writes = array(step.page_writes).reshape(-1, 3)
        self._page_table[writes[:, 0], writes[:, 1]] = writes[:, 2]
        if self._is_last:
            for opened in step.opens:
                self._sampler.open(opened)
                self._prompts.open(opened)
        return lay_out(step, self._page_table)

    def _receive(self, step: Step, rows: Rows, deal: Deal, carried: np.ndarray | None) -> torch.Tensor | None:
        """All that comes from other stages: rows, or in stage 0 the tokens fed back."""
        if self._is_first:
            self._fed.await_slots(rows.owners[rows.fed])
        return self._joined.receive(self._decoder.num_edge_rows(deal), carried)

    def _deal(self, rows: Rows, regime: Regime, stretches: Sequence[Stretch] = ()) -> Deal:
        """Of a step's rows; logits are asked for of those that are sampled, and then of those that tell of prompts."""
        head_rows = np.concatenate([rows.sampled, *(stretch.rows for stretch in stretches)])
        build = self._decoder.build
        return Deal(build.plan, build.rank, rows.counts, regime, self._device, head_rows=head_rows)

    def _expect(self, step: Step, rows: Rows) -> ExpectedTokens:
        if not step.settles:
            return self._joined.expect_tokens(len(rows.sampled))
        if self._is_last:
            return ToldTokens(self._joined.expect_tokens(step.num_told), len(rows.sampled))
        begin, limit_s = partial(self._fed.collect, step.number), self._settings.step_timeout_s
        brought = Brought(self._joined.expect_tokens, step.num_told, self._aside, limit_s, begin)
        self._settle.owe(step, rows, brought)
        return ToldTokens(brought, len(rows.sampled))

    def _tell(self, step: Step, rows: Rows, sampled: Sampled, drafts: torch.Tensor | None) -> None:
        """Stage 0, and this rank's own host, what may settle items of the next step."""
        told = sampled.tokens.to(torch.int32)
        if drafts is not None:
            told = torch.cat((told, drafts.flatten()))
        self._joined.send_tokens(told)
        self._settle.owe(step, rows, Own(told, self._settings.step_timeout_s))

    def _plan_attention(self, rows: Rows, deal: Deal) -> Mapping[int, Attend]:
        """A chunk of an item sees the item's keys up to the chunk's own end."""
        chunks = deal.chunks
        ends = (rows.starts[chunks.items] + chunks.begins + chunks.counts).astype(np.int32)
        return self._decoder.plan_attention(chunks.counts.astype(np.int32), ends, self._table_of(rows.slots[chunks.items], ends))

    def _batch(
        self,
        rows: Rows,
        deal: Deal,
        attention: Mapping[int, Attend],
        routed: list[torch.Tensor] | None = None,
    ) -> Batch:
        """This rank's part of a step."""
        mine = deal.own()
        context = [deal.own(rank) for rank in self._context] if deal.regime.cp else []
        every = np.concatenate(context) if context else mine[:0]
        tokens, positions, pages, owners, every_position, every_page, slots, fresh = upload(
            [
                rows.tokens[mine],
                rows.positions[mine],
                rows.pages[mine],
                rows.owners[mine],
                rows.positions[every],
                rows.pages[every],
                rows.slots.astype(np.int64),
                rows.starts == 0,
            ],
            self._device,
        )
        return Batch(
            tokens=self._fed.fill(tokens, owners) if self._is_first and rows.fed.any() else tokens,
            positions=positions,
            pages=pages,
            attention=attention,
            shared=Shared([len(own) for own in context], every_position, every_page) if context else None,
            caches=self._caches,
            items=Items(slots, fresh, rows.counts, rows.replays, rows.holds, {}),
            routed=routed,
            attend_heads=partial(self._plan_attention, rows, deal.heads) if deal.heads is not None and deal.num_rows >= _MANY else None,
            num_sampled=len(rows.sampled),
        )

    @cached_property
    def _context(self) -> list[int]:
        """The ranks that share this one's context, along cp."""
        return list(self.collectives.mesh.spans["cp"].members(self.collectives.rank))

    def _table_of(self, slots: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Page tables of items, int32 [I, P], as wide as the longest needs."""
        return self._page_table[slots, : -(-int(ends.max(initial=0)) // PAGE)]

    def _cut(self, logits: torch.Tensor) -> CutLogits:
        return CutLogits(logits, self._vocab_size, self._along_vocabulary)

    def _logits(self, normed: torch.Tensor) -> CutLogits:
        """Of rows as the head reads them."""
        assert self._decoder.head is not None, "of the last stage"
        return self._cut(self._decoder.head.logits(normed))

    def _sample(self, step: Step, rows: Rows, logits: CutLogits) -> Sampled:
        """Tokens of the rows that are sampled; sent back before anything else is computed of them, unless drafts go with them."""
        sampled = self._sampler.sample(logits, rows.owners[rows.sampled], rows.positions[rows.sampled] + 1, self._bans(step, rows))
        if step.returns and not step.settles:
            self._joined.send_tokens(sampled.tokens.to(torch.int32))
        return sampled

    def _bans(self, step: Step, rows: Rows) -> list[tuple[int, list[int]]]:
        """A step names items; the sampler names sampled rows. An item with bans has no drafts, so it has one such row."""
        ends = np.cumsum(rows.samples)
        return [(int(ends[item]) - 1, ids) for item, ids in step.bans]

    def _draft(
        self,
        step: Step,
        rows: Rows,
        deal: Deal,
        batch: Batch | None,
        computed: Computed,
        sampled: Sampled | None,
        graph: Graph | None = None,
    ) -> torch.Tensor | None:
        """What the head that drafts, if there is one, makes of a step: int32 [items that sample, Step.drafts]. A step that a graph
        computed has no batch."""
        if self._drafter is None or computed.normed is None:
            return None
        if graph is not None and self._chains is not None and step.drafts and sampled is not None:
            drafts = self._chains.draft(graph, rows, sampled.tokens, step.drafts)
            if drafts is not None:
                return drafts
        batch = batch or self._batch(rows, deal, self._plan_attention(rows, deal) if step.drafts else {})
        return self._drafter.draft(step, rows, deal, batch, computed.normed, None if sampled is None else sampled.tokens)

    def _describe(
        self, sampled: Sampled | None, drafts: torch.Tensor | None, stretches: list[Stretch], unread: torch.Tensor | None
    ) -> Callable[..., Outcome]:
        """Compute what was asked of logprobs. What is returned makes the outcome, once the device has come so far."""
        tokens = described = None
        if sampled is not None:
            tokens, described = download(sampled.tokens.to(torch.int32)), sampled.describe()
        drafts, told = None if drafts is None else download(drafts), []
        if stretches:
            assert unread is not None, "of the last stage"
            parts = unread.split([len(stretch.rows) for stretch in stretches])
            told = [stretch.describe(part, self._logits) for stretch, part in zip(stretches, parts, strict=True)]

        def read(*where: int, clock: Clock) -> Outcome:
            logprobs: list[Logprobs | None] = []
            if sampled is not None and described is not None:
                logprobs = [None] * len(sampled.tokens)
                for row, value in zip(sampled.asked, described.read(), strict=True):
                    logprobs[row] = value
            return Outcome(
                *where,
                tokens=b"" if tokens is None else tokens.numpy().tobytes(),
                logprobs=logprobs,
                prompt_logprobs=[stretch.tell(values) for stretch, values in zip(stretches, told, strict=True)],
                clock=clock,
                drafts=b"" if drafts is None else drafts.numpy().tobytes(),
            )

        return read

    @torch.inference_mode()
    def _make_room(self, max_model_len: int, progress: Callable[[str], None]) -> None:
        """Find out how many pages and snapshots there is room for, take them, and make graphs over them."""
        settings, num_drafts = self._settings, self._decoder.build.plan.mtp
        captured = [] if self._why_no_graphs else shapes(settings, self._decoder)
        in_pieces = [] if self._why_no_graphs else piece_sizes(settings, self._device)
        self._num_held = 1 + num_drafts if num_drafts else 0
        sizes = Sizes.of(self._decoder.keeps, self._num_held)
        most_rows = min(settings.max_num_batched_tokens, settings.max_num_seqs * max_model_len)
        most_items = min(settings.max_num_seqs, most_rows)
        check_states(settings, self._device, sizes, self._stage)
        self._allocate(1, 0)

        largest_of_all = list(largest_steps(settings, self._decoder.build.plan.regimes, most_rows, num_drafts, self._device))
        most_drafting = max(1, min(most_items, settings.mtp.max_batch_size, most_rows // self._num_held)) if self._num_held else 0

        def largest() -> None:
            for counts, regime in largest_of_all:
                self._try(Trial(counts, regime))
            verify()

        def decode() -> None:
            self._try(Trial(np.ones(most_items, np.int32)))
            if in_pieces:
                rows = min(in_pieces[0], most_rows)
                self._try(Trial(spread(rows, -(-rows // max_model_len))))
            verify()

        def verify() -> None:
            if self._num_held:
                self._try(Trial(np.full(most_drafting, self._num_held, np.int32), samples=self._num_held, holds=True))

        rehearse(self.collectives)
        if self._compiles:
            progress("is compiling kernels")
            for trial in trials(
                largest_of_all,
                most_items=most_items,
                most_drafting=most_drafting,
                max_len=max_model_len,
                num_held=self._num_held,
                cp=settings.context_parallel_size,
                mixes=any(not isinstance(keep, PerToken) for keep in self._decoder.keeps),
            ):
                self._try(trial, SAMPLINGS)
            for mixture in self._decoder.mixtures:
                for num_rows in arrivals(most_rows, mixture.placement.slots_per_rank, self._decoder.build.spec.num_experts_per_tok):
                    mixture.compute_any(num_rows)
            for num_rows in tiles(most_rows):
                self._decoder.multiply_any(num_rows)
            for num_rows in tiles(max(most_items + most_drafting * num_drafts, CHUNK)):
                self._decoder.sample_any(num_rows)
        progress("is measuring its memory")
        self.room = find_room(
            settings,
            self._device,
            sizes,
            largest=largest,
            decode=decode,
            num_graphs=len(captured) * (1 if self._decoder.mtp is None else 3) + len(in_pieces),
            mailbox_bytes=self.collectives.mailbox.memory.nbytes if self.collectives.mailbox is not None else 0,
        )
        self.collectives.leave()
        self.num_pages = num_pages(self.room, sizes, settings, self._stage)
        self.num_snapshots = num_snapshots(self.room, sizes)
        self._allocate(self.num_pages + bool(captured), self.num_snapshots or 0)
        if captured:
            progress("is capturing graphs")
            self._graphs = Graphs(
                self._decoder,
                self._caches,
                captured,
                fill=self._fed.fill,
                scratch_page=self.num_pages,
                max_pages=self._page_table.shape[1],
            )
            if self._drafter is not None:
                self._chains = Chains(
                    self._decoder,
                    self._drafter,
                    self._caches,
                    self._graphs,
                    most_items=settings.mtp.max_batch_size,
                    scratch_page=self.num_pages,
                    max_pages=self._page_table.shape[1],
                )
            if in_pieces:
                self._pieces = Pieces(self._decoder, self._caches, in_pieces, fill=self._fed.fill, scratch_page=self.num_pages)
            if self._graphs_are_of_epochs:
                rehearse(self.collectives)
                if self._pieces is not None:
                    self._pieces.warm()
                self._graphs.warm()
                if self._chains is not None:
                    self._chains.warm()
                self.collectives.leave()
            else:
                self._capture(lambda: False)

    def _allocate(self, num_pages: int, num_snapshots: int) -> None:
        """The caches of all blocks, in place of those there were, which are freed first."""
        num_slots, pools = self._settings.max_num_seqs, []
        self._caches, self._states, self._drafter = [], States(pools, num_slots), None
        head = self._decoder.mtp
        if head is not None:
            self._drafter = Drafter(self._decoder, head, self._caches, num_pages, self._page_table)
        for number, keep in enumerate(self._decoder.keeps):
            if isinstance(keep, PerToken):
                spare = num_slots if head is not None and head.attention.cache == number else 0
                self._caches.append(keep.allocate(num_pages + spare, self._device))
            else:
                inputs, states, held = keep.allocate(num_slots, num_snapshots, self._num_held, self._device)
                self._caches.append((inputs, states, held))
                pools += [inputs, states]

    @property
    def _compiles(self) -> bool:
        """Whether kernels are compiled when they are first launched."""
        return self._device.type != "cpu"

    def _try(self, trial: Trial, samplings: Sequence[Sampling] = (GREEDY, DRAWN)) -> None:
        """A step of prompts that mean nothing, all in one page, sampled in several ways."""
        (counts, regime, samples, holds), num_items = trial, len(trial.counts)
        zeros, each = ints(np.zeros(num_items)), ints(np.minimum(counts, samples))
        step = Step(
            0,
            0,
            slots=ints(np.arange(num_items)),
            starts=zeros,
            counts=ints(counts),
            samples=each,
            tokens=ints(np.zeros(counts.sum())),
            replays=ints(counts) if holds else zeros,
            holds=ints(np.ones(num_items)) if holds else zeros,
            nexts=ints(np.full(num_items, -1)),
            sp=regime.sp,
            cp=regime.cp,
            drafts=self._decoder.build.plan.mtp,
        )
        rows = lay_out(step, self._page_table)
        deal = self._deal(rows, regime)
        edge = torch.zeros(self._decoder.num_edge_rows(deal), self.hidden, dtype=self.dtype, device=self._device)
        batch = self._batch(rows, deal, self._plan_attention(rows, deal))
        computed = self._decoder.forward(batch, deal, None if self._is_first else edge)
        if self._is_last:
            sampled = None
            for sampling in samplings:
                self._sampler.open(Open(0, sampling, 1, zeros))
                sampled = self._sample(step, rows, self._cut(computed.rows))
                sampled.describe()
            self._draft(step, rows, deal, batch, computed, sampled)
            self._sampler.clear()
