"""Scheduler: the only place that decides what runs. `next() -> Step`, `learn(Outcome) -> [Emission]`, one way. No threads, no torch.

A step holds decodes first, then prompt rows: half of those go to the oldest prompt, the other half to the shortest ones.
With context parallelism it holds the ones or the others, in turn.
Pages and slots are given back only after the last planned step that names them has returned.

Of a sequence with drafts an item is its last token and those drafts, and only the answer says how many of them are the model's own.
Its next item is planned before that all the same, once, unsettled: the ranks know sooner where it begins, and with which tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush

import msgspec
import numpy as np

from trireme.core.refusal import Refusal
from trireme.core.request import Emission, Logprobs, Request
from trireme.core.settings import Limits
from trireme.core.step import FED, PAGE, Clock, Open, Outcome, Step, array, ints
from trireme.engine.chunks import ChunkSizer
from trireme.engine.draft import DraftLength, Drafts
from trireme.engine.pages import Pages
from trireme.engine.prefix import extend_names, find_prefix
from trireme.engine.prompts import Prompts
from trireme.engine.refusals import check_request, no_longer_fits, queue_full, struck_out, too_late
from trireme.engine.sequence import Group, Sequence, State, pages_of
from trireme.engine.sheet import Flight, Sheet
from trireme.engine.slots import Slots
from trireme.engine.states import Snapshots
from trireme.engine.stats import Stats
from trireme.engine.waiting import Waiting, length_rank

_LEAST_CHUNK = 64  # rows: prompts are not cut finer to fill the pipeline, since a step has costs of its own
_MOST_STRIKES = 3  # epochs in a row that may break on a sequence which gets no further


class Scheduler:
    """Not thread-safe: the engine's thread drives it. `clock` gives seconds, as in Request.deadline."""

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        stats: Stats | None = None,
        epoch: int = 0,
        maps: list[int] | None = None,
    ):
        """`maps`: version of the expert maps with which each stage begins; None: 0."""
        self.limits = limits
        self.epoch = epoch
        self._maps = maps or [0] * limits.num_stages  # what a step is stamped with: ready in every rank of the stage
        self.records = False  # whether steps planned from now on tell the service of experts of those of every row
        self.stats = stats or Stats(limits.num_stages)
        self._clock = clock
        self._groups: dict[str, Group] = {}
        self._num_groups = 0  # ever
        self._num_queued = 0  # requests of which nothing has run
        self._deadlines: list[tuple[float, int, Group]] = []  # heap
        self._chunks = ChunkSizer(limits.max_num_batched_tokens) if limits.dynamic_chunks else None
        self._waiting = Waiting()
        self._draft_length = DraftLength(limits.num_drafts, adapts=limits.adaptive_drafts)
        self._reset()

    def _reset(self) -> None:
        """No step, no page, no slot: the start of an epoch."""
        self._pages = Pages(self.limits.num_pages)
        self._reuses = self.limits.enable_prefix_caching and self.limits.num_snapshots != 0  # states are reused with pages or not at all
        self._snapshots = Snapshots(self.limits.num_snapshots or 0)
        self._saves = self._reuses and bool(self.limits.num_snapshots)  # whether states are kept at the ends of chunks
        self._slots = Slots(self.limits.max_num_seqs, self.limits.num_drafts)
        self._drafts = Drafts(self._slots, self._draft_length, self.stats) if self.limits.num_drafts else None
        self._unsettled = self.limits.fed_back and self.limits.inflight > 1 and self.limits.num_stages <= 2  # no stage between tells none
        self._running: dict[int, Sequence] = {}  # by slot: RUNNING, LEAVING, or DONE and not yet parted
        self._prompts = Prompts(self._slots)
        self._prompt_rows_in_flight = 0
        self._flights: deque[Flight] = deque()  # planned, not returned; by number
        self._early: dict[int, Outcome] = {}  # answers that overtook that of an older step
        self._parting: dict[int, list[Sequence]] = {}  # by the number of the last step that names them
        self._next_number = 0
        self._prefilled = False  # whether the last step held prompt rows

    # ---- what the engine reads

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue; those of n > 1 enter it when the request's first has computed their prompt."""
        return len(self._waiting)

    @property
    def num_queued(self) -> int:
        """Requests of which nothing has run yet: what max_queue_size bounds."""
        return self._num_queued

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    @property
    def num_pages_used(self) -> int:
        return self._pages.num_used

    @property
    def num_snapshots_used(self) -> int:
        return self._snapshots.num_used

    @property
    def next_deadline(self) -> float | None:
        """Clock seconds of the earliest deadline of a request under way."""
        while self._deadlines and not self._deadlines[0][2].num_unfinished:
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._groups

    # ---- requests come and go

    def check(self, request: Request) -> None:
        """Refusal for a request that could never run, whatever the load."""
        check_request(request, self.limits)

    def add(self, request: Request) -> None:
        """Take a request into the queue; Refusal where it can never run, its id is taken, or the queue is full."""
        self.check(request)
        if request.id in self._groups:
            raise Refusal(f"request id {request.id!r} is in use", why="ids tell answers apart", fix="use a fresh id")
        if self._num_queued >= self.limits.max_queue_size:
            raise queue_full(self._num_queued)
        self._num_groups += 1
        self._num_queued += 1
        group = Group(request, arrived=self._clock(), order=self._num_groups, num_unfinished=request.sampling.n)
        group.sequences = [Sequence(group, index, self.limits.max_model_len) for index in range(request.sampling.n)]
        self._groups[request.id] = group
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, group.order, group))
        share_prompt = self._reuses and not request.routed_experts and len(request.prompt) > PAGE
        for sequence in group.sequences:
            if share_prompt and sequence.index > 0:
                sequence.state = State.HELD
            else:
                self._waiting.push(sequence)

    def cancel(self, request_id: str, reason: str = "cancelled", index: int | None = None) -> list[Emission]:
        """End a request, or its sequence `index`; "stop" where its text met a stop string. One that has ended is no fault."""
        group = self._groups.get(request_id)
        error = Refusal("request cancelled", kind="cancelled") if reason == "cancelled" else None
        sequences = group.sequences if group else []
        return self._end((s for s in sequences if index in (None, s.index)), reason, error)

    def expire(self) -> list[Emission]:
        """End the requests whose deadline has passed."""
        news: list[Emission] = []
        while (deadline := self.next_deadline) is not None and deadline <= self._clock():
            group = heappop(self._deadlines)[2]
            error = too_late(self._clock() - group.arrived)
            news += self._end(group.sequences, "deadline", error)
        return news

    def fail_all(self, error: Exception) -> list[Emission]:
        """End every request with `error`."""
        return [news for group in list(self._groups.values()) for news in self._end(group.sequences, "error", error)]

    def restart(
        self,
        epoch: int,
        num_pages: int | None = None,
        error: Exception | None = None,
        num_snapshots: int | None = None,
        maps: list[int] | None = None,
        sp_from: int | None = None,
    ) -> list[Emission]:
        """A new epoch: forget steps, pages, snapshots and slots, and queue what ran, by rank, with its tokens so far.

        `error` is what broke the old epoch. Sequences of its oldest unreturned step that got no further for several
        epochs in a row are ended with it, and so are those that no longer fit in `num_pages`.
        """
        news: list[Emission] = []
        suspects = self._flights[0].sequences if self._flights and error is not None else []
        running = list(self._running.values())
        self.epoch = epoch
        self._maps = maps or [0] * self.limits.num_stages
        if num_pages is not None:
            self.limits = msgspec.structs.replace(self.limits, num_pages=num_pages)
        if num_snapshots is not None:
            self.limits = msgspec.structs.replace(self.limits, num_snapshots=num_snapshots)
        if sp_from is not None:
            self.limits = msgspec.structs.replace(self.limits, sp_from=sp_from)
        self._reset()
        for sequence in running:
            if sequence.state is not State.DONE:
                self._enqueue(sequence)
        for sequence in suspects:
            sequence.strikes = 1 if sequence.furthest > sequence.furthest_at_strike else sequence.strikes + 1
            sequence.furthest_at_strike = sequence.furthest
            if sequence.strikes >= _MOST_STRIKES:
                news += self._end([sequence], "error", struck_out(_MOST_STRIKES, error))
        for sequence in [s for group in self._groups.values() for s in group.sequences]:
            if pages_of(sequence.limit - 1) > self.limits.num_pages:
                news += self._end([sequence], "error", no_longer_fits(self.limits.num_pages))
        return news

    # ---- planning

    def next(self) -> Step | None:
        """The next step, or None where nothing can run before an outcome or a request comes."""
        if len(self._flights) >= self.limits.inflight:
            return None
        sheet = Sheet(self._next_number)
        mixes = self.limits.cp == 1
        plans = [self._plan_decodes, self._plan_prompts]
        if not mixes and not self._prefilled:
            plans.reverse()  # in turn, so that neither starves
        for plan in plans:
            if mixes or not sheet.sequences:
                plan(sheet)
        if not sheet.sequences:
            self._plan_decodes(sheet, ahead=True)
        if not sheet.sequences:
            return None
        self._look_ahead(sheet)
        sheet.routed = np.flatnonzero(self._slots.routed[sheet.items[0]])
        self._flights.append(sheet.flight())
        self._prompt_rows_in_flight += sheet.prompt_rows
        self._prefilled = sheet.prompt_rows > 0
        self._next_number += 1
        step = sheet.step(self.epoch, self.limits, self._snapshots, self._maps, records=self.records)
        self.stats.step_planned(step, falls_back=not mixes and self._prefilled and not step.cp)
        return step

    @property
    def _num_returned(self) -> int:
        """Steps below this number have returned."""
        return self._flights[0].number if self._flights else self._next_number

    def _plan_decodes(self, sheet: Sheet, *, ahead: bool = False) -> None:
        slots, limits, number = self._slots, self.limits, sheet.number
        decodes = slots.decodes()
        room, num_steps = limits.max_num_batched_tokens, limits.num_stages  # that share the decodes
        if self._prompts or len(self._waiting):
            if limits.cp == 1:
                room -= min(PAGE, room // 2)  # however many decode, prompts go on
            else:
                num_steps = -(-num_steps // 2)  # every other step is for prompts
        most = limits.max_micro_batch_size or -(-int(np.count_nonzero(decodes)) // num_steps)
        unsettled = self._drafts is not None and self._unsettled and not self.records  # for which leaders must know where rows stand
        ready = slots.ready(decodes, number, self._num_returned, limits.num_stages, ahead=ahead, unsettled=unsettled)
        chosen = ready[: min(most, room)] if ahead else slots.deal(ready, decodes, min(most, room))
        if self._drafts is not None:
            self._drafts.keep(chosen, room - len(chosen), self._pages.num_free, self._num_returned)
        chosen, growing = self._room_for(chosen)
        if not len(chosen):
            return
        for slot, page in zip(growing.tolist(), self._pages.take(len(growing)), strict=True):
            pages = self._running[slot].pages
            sheet.writes.append((slot, len(pages), page))
            pages.append(page)
        slots.held[growing] += 1
        starts = slots.planned[chosen]
        tokens = np.where(slots.known[chosen] == slots.length[chosen], slots.token[chosen], FED)
        slots.planned[chosen] += 1
        slots.length[chosen] += 1
        slots.before[chosen], slots.last_step[chosen] = slots.last_step[chosen], number
        sequences = [self._running[slot] for slot in chosen.tolist()]
        sheet.bans += [
            (item, words) for item, sequence in enumerate(sequences) if sequence.sampling.bad_words and (words := sequence.banned())
        ]
        counts, replays = 1, 0
        if self._drafts is not None:
            unsettled = slots.unsettled(chosen, self._num_returned)
            sheet.unsettled = np.flatnonzero(unsettled)
            counts, replays, tokens = self._drafts.rows(chosen, tokens, unsettled, number)
        sheet.add(sequences, chosen, starts, counts, ints(tokens), samples=counts, replays=replays)

    def _room_for(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(those of the slots that can decode now, those among them that need a page more); preempts where pages are short."""
        slots = self._slots
        while True:
            growing = chosen[slots.reach(chosen, self._num_returned) + slots.num_drafts[chosen] >= slots.held[chosen] * PAGE]
            short = len(growing) - self._pages.num_free
            if short <= 0:
                return chosen, growing
            if (unsettled := slots.unsettled(chosen, self._num_returned)).any():  # which may not need as much
                chosen = chosen[~unsettled]
                continue
            working = [s for s in self._running.values() if s.state is State.RUNNING and slots.length[s.slot] < slots.limit[s.slot]]
            coming = sum(len(s.pages) for s in self._running.values()) - sum(len(s.pages) for s in working)
            if coming >= short:
                break
            self._preempt(max(working, key=lambda sequence: sequence.rank))
            chosen = chosen[slots.live[chosen]]
        # Steps in flight will bring the pages: until then go on with those that need none, and with the first by rank.
        by_rank = sorted(growing.tolist(), key=lambda slot: self._running[slot].rank)
        postponed = by_rank[self._pages.num_free :]
        return chosen[~np.isin(chosen, postponed)], np.array(by_rank[: self._pages.num_free], np.int64)

    def _plan_prompts(self, sheet: Sheet) -> None:
        """Half of the rows to the oldest prompt, unless it needs less or is alone; the others to the shortest, so that neither starves."""
        rows = self._num_prompt_rows(min(self._chunk_rows(), self.limits.max_num_batched_tokens - sheet.num_rows))
        if rows <= 0:
            return
        oldest, may_admit = self._oldest_prompt(sheet)
        if oldest is None:
            return
        need = self._prompts.left(oldest)
        alone = len(self._prompts) == 1 and not len(self._waiting)
        grain = PAGE if self._saves and rows >= 2 * PAGE else 1  # chunks end at whole pages, but nobody waits for a page of rows
        share = need if need <= rows else rows if alone else -(-rows // 2)
        rows -= share
        while rows >= grain:
            shortest = self._prompts.shortest(sheet.number, besides=oldest)
            waiting = self._waiting.shortest if may_admit else None
            if waiting is not None and (shortest is None or length_rank(waiting, len(waiting.log)) < self._prompts.length_rank(shortest)):
                may_admit = self._admit(waiting, sheet)
                shortest = waiting if may_admit else shortest
            if shortest is None:
                break
            rows -= self._plan_chunk(sheet, shortest, rows)
        self._plan_chunk(sheet, oldest, share + min(rows, need - share))

    def _chunk_rows(self) -> int:
        """Prompt rows of a step at the most: fewer where a long prompt's rows have come to cost more, since its chunks follow one
        another through the stages and the slowest holds up all others."""
        oldest = self._prompts.oldest
        if self._chunks is None or oldest is None:
            return self.limits.max_num_batched_tokens
        return self._chunks.rows(int(self._slots.planned[oldest.slot]))

    def _num_prompt_rows(self, room: int) -> int:
        """Prompt rows of this step: what there is to compute in equal steps, at least one for each stage."""
        pending = self._prompts.num_rows + self._waiting.num_rows
        if not pending or room <= 0:
            return 0
        pending += self._prompt_rows_in_flight
        num_steps = max(-(-pending // room), min(self.limits.num_stages, self.limits.inflight))
        return min(room, max(_LEAST_CHUNK, -(-pending // num_steps)))

    def _oldest_prompt(self, sheet: Sheet) -> tuple[Sequence | None, bool]:
        """(the first prompt by rank, whether others may be admitted). Nobody overtakes one that waits for pages or a slot."""
        first = self._prompts.oldest
        waiting = self._waiting.first
        if waiting is None or (first is not None and first.rank < waiting.rank):
            return first, True
        if self._admit(waiting, sheet, preempts=True):
            return waiting, True
        return first if first in self._prompts else None, False  # it may have had to make room

    def _admit(self, sequence: Sequence, sheet: Sheet, *, preempts: bool = False) -> bool:
        """Give a waiting sequence a slot and pages for its whole log, reused ones where there are; False where they are short.

        With `preempts`, sequences of lower priority make room, in this step or a later one.
        """
        found = find_prefix(self._pages, sequence.names, sequence.log) if self._reuses and sequence.reuses else []
        snapshot = -1
        if self.limits.num_snapshots is not None:
            num_found, snapshot = self._snapshots.longest(sequence.names[: len(found)])
            found = found[:num_found]
        self._pages.hold(found)
        num_new = pages_of(len(sequence.log)) - len(found)
        while not self._fits(num_new):
            victim = max(self._running.values(), key=lambda running: running.rank, default=None)
            if not preempts or self._parting or victim is None or victim.rank[0] <= sequence.rank[0]:
                self._pages.drop(found)
                return False
            self._preempt(victim)
        self._waiting.remove(sequence)
        sequence.pages = found + self._pages.take(num_new)
        sequence.num_named = len(found)
        sequence.state = State.RUNNING
        sequence.slot = self._slots.open(
            planned=len(found) * PAGE,
            length=len(sequence.log),
            limit=sequence.limit,
            held=len(sequence.pages),
            fed=self.limits.fed_back and self.limits.inflight > 1 and not sequence.sampling.waits_for_token,
            drafting=sequence.drafts,
            routed=sequence.routed is not None,
        )
        self._running[sequence.slot] = sequence
        self._prompts.add(sequence)
        sheet.opens.append(Open(sequence.slot, sequence.sampling, sequence.prompt_len, sequence.history))
        sheet.writes += [(sequence.slot, index, page) for index, page in enumerate(sequence.pages)]
        if snapshot >= 0:
            sheet.restores.append((snapshot, sequence.slot))
            self.stats.snapshot_hits += 1
        self._began(sequence, len(found) * PAGE)
        return True

    def _fits(self, num_new: int) -> bool:
        """Whether a slot and the pages are there, and a few pages more for those that decode."""
        spare = max(1, self._pages.num_pages // 100) if self._running else 0
        return self._slots.num_free > 0 and self._pages.num_free >= num_new + spare

    def _began(self, sequence: Sequence, num_cached: int) -> None:
        """Count a sequence's first start; a later one only computes again what it had."""
        group = sequence.group
        if group.queued:
            group.queued = False
            self._num_queued -= 1
            self.stats.observed.queued.append(self._clock() - group.arrived)
        if sequence.num_cached is None:
            sequence.num_cached = num_cached
            self.stats.prompt_tokens += sequence.prompt_len
            self.stats.cached_tokens += num_cached

    def _plan_chunk(self, sheet: Sheet, sequence: Sequence, most: int) -> int:
        """The next rows of a prompt, at most so many; how many they are."""
        slots, slot, log = self._slots, sequence.slot, sequence.log
        start = int(slots.planned[slot])
        end = self._chunk_end(start, start + most, len(log))
        samples = end == len(log)
        slots.planned[slot] = end
        slots.last_step[slot] = sheet.number
        if samples:
            slots.length[slot] += 1
            slots.decoding[slot] = True
            self._prompts.discard(sequence)
            if banned := sequence.banned():
                sheet.bans.append((len(sheet.sequences), banned))
        if self._saves and end % PAGE == 0:
            extend_names(sequence.names, log, end // PAGE)
            sheet.saves.append((sequence.names[end // PAGE - 1], slot))
        follows = -1 if samples else log[end]
        sheet.add([sequence], slot, start, end - start, log[start:end].tobytes(), samples=samples, nexts=follows)
        sheet.prompt_rows += end - start
        return end - start

    def _chunk_end(self, start: int, most: int, num_tokens: int) -> int:
        """Where a chunk ends, at `most` at the latest. Snapshots stand for whole pages: a chunk with one in it ends at its last, and
        the tail of a prompt, which no other can reuse, is a chunk of its own.

            0 ...... 16 ...... 32 .. 37        prompt of 37: [0, 32) and [32, 37); of 32: [0, 16) and [16, 32)
        """
        end = min(most, num_tokens)
        if self._saves:
            whole = min(end, num_tokens - 1) // PAGE * PAGE
            return whole if whole > start else end
        return end

    def _look_ahead(self, sheet: Sheet) -> None:
        """What is to become of the tokens that the step samples: drafts are made for those that may verify one next; tokens, and
        drafts with them, may be fed back."""
        slots, number, sampled = self._slots, sheet.number, sheet.sampled
        if self._drafts is not None and len(self._running) <= self.limits.max_drafting:
            sheet.drafts = self._drafts.ask(sampled, number)
        fed = slots.fed[sampled] & (self._unsettled | (slots.awaits[sampled] < number)) & (slots.length[sampled] < slots.limit[sampled])
        sheet.returns = bool(fed.any())

    # ---- learning

    def maps_ready(self, versions: Iterable[int]) -> None:
        """Of the live epoch's stages, in the answers to one step, each says which version of its expert maps it is ready to use; steps
        planned from now on say that it shall. An answer that was overtaken changes nothing: a stamp is never taken back."""
        self._maps = [max(stamped, ready) for stamped, ready in zip(self._maps, versions, strict=True)]

    def learn(self, outcome: Outcome) -> list[Emission]:
        """The last stage's answer to a step that has returned from every stage. Answers of one epoch may come in any
        order and are taken by number; a second one, or one of another epoch, is ignored."""
        news: list[Emission] = []
        if outcome.epoch != self.epoch or outcome.number < self._num_returned:
            return news
        self._early[outcome.number] = outcome
        while self._flights and (found := self._early.pop(self._flights[0].number, None)) is not None:
            flight = self._flights.popleft()
            self._prompt_rows_in_flight -= flight.prompt_rows
            self._take(flight, found, news)
            for sequence in self._parting.pop(flight.number, ()):
                self._part(sequence)
        return news

    def time(self, step: Step, clocks: list[Clock], *, was_idle: bool) -> None:
        """What each stage's clock says of a step; `was_idle`: nothing was under way when it was sent. A chunk's successor waits for the
        slowest stage; how often the first one can begin a step is how often its sequences get tokens."""
        if self._chunks is not None:
            self._chunks.learn(array(step.starts), array(step.counts), max(clock.busy for clock in clocks))
        if self._drafts is not None and step.num_rows == step.num_samples:
            first, verifies = clocks[0], step.num_samples > len(array(step.slots))
            if verifies or not was_idle:  # else it was requests that the stage waited for
                seconds = first.waiting + first.receiving + first.busy
                self._draft_length.cost.learn(step.num_rows, step.drafts, verifies, seconds)

    def _take(self, flight: Flight, outcome: Outcome, news: list[Emission]) -> None:
        for part in outcome.prompt_logprobs:
            values = self._running[part.slot].prompt_logprobs
            if values is not None:
                values[part.start + 1 : part.start + 1 + len(part.values)] = part.values
        sampled = array(outcome.tokens)
        if self._drafts is not None and (flight.drafts or flight.verifies):
            stands = self._drafts.verify(flight, sampled, outcome.drafts)
        else:
            stands = flight.samples
            self._slots.known[flight.sampled] += 1
            self._slots.token[flight.sampled] = sampled
        if self._drafts is not None:
            flight.ends = self._ends(flight)
        if flight.routed:
            self._take_routed(flight, stands, np.frombuffer(outcome.routed_experts, np.int16))
        now, tokens, logprobs, at = self._clock(), sampled.tolist(), outcome.logprobs, 0
        for sequence, end, samples, stand in zip(flight.sequences, flight.ends, flight.samples, stands, strict=True):
            if end > sequence.furthest:
                sequence.furthest = end
            if sequence.state is not State.DONE:  # else its tokens were sampled before the stop was known
                if stand:
                    values = [value for value in logprobs[at : at + stand] if value is not None] if logprobs else []
                    news.append(self._advance(sequence, tokens[at : at + stand], values, end, now))
                elif end >= (sequence.num_named + 1) * PAGE:
                    self._name_pages(sequence, end)
            at += samples

    def _ends(self, flight: Flight) -> list[int]:
        """Tokens of each item's sequence that are computed, once slots have taken what was sampled: all but the last one."""
        known = iter(self._slots.known[flight.sampled].tolist())
        return [next(known) - 1 if samples else end for samples, end in zip(flight.samples, flight.ends, strict=True)]

    def _take_routed(self, flight: Flight, stands: list[int], told: np.ndarray) -> None:
        """Experts of rows, int16 [rows * layers * experts of a row]. Rows of drafts that did not stand are nobody's."""
        rows, at = told.reshape(sum(count for *_, count in flight.routed), -1), 0
        for item, start, count in flight.routed:
            routed = flight.sequences[item].routed
            assert routed is not None, "its slot says so"
            routed.take(start, rows[at : at + (stands[item] if flight.samples[item] > 1 else count)])
            at += count

    def _name_pages(self, sequence: Sequence, num_tokens: int) -> None:
        """Let reuse find the full pages among the first tokens of a log, all computed."""
        if not self._reuses:
            return
        num_full = num_tokens // PAGE
        extend_names(sequence.names, sequence.log, num_full)
        for index in range(sequence.num_named, num_full):
            self._pages.name(sequence.pages[index], sequence.names[index])
        sequence.num_named = num_full

    def _advance(self, sequence: Sequence, tokens: list[int], logprobs: list[Logprobs], end: int, now: float) -> Emission:
        """Tokens more of a sequence, its first `end` ones computed, and what that is to its user. What follows a stop is dropped."""
        group, observed, prompt_logprobs = sequence.group, self.stats.observed, None
        has_begun = sequence.num_output > 0
        reason = sequence.extend(tokens)
        if has_begun:
            for _ in tokens:
                observed.inter_token.append((now - sequence.emitted_at) / len(tokens))
        else:
            observed.time_to_first_token.append(now - group.arrived)
            if sequence.prompt_logprobs is not None:
                prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
                sequence.sampling = msgspec.structs.replace(sequence.sampling, prompt_logprobs=None)
                self._slots.drafting[sequence.slot] = sequence.drafts
            if sequence.index == 0:
                self._release_siblings(group)
        sequence.emitted_at = now
        self.stats.generation_tokens += len(tokens)
        if end >= (sequence.num_named + 1) * PAGE:
            self._name_pages(sequence, min(end, len(sequence.log)))
        routed_experts = sequence.routed.tell() if sequence.routed is not None else None
        if reason is not None:
            return self._finish(
                sequence,
                reason,
                tokens=tokens,
                logprobs=logprobs[: len(tokens)],
                prompt_logprobs=prompt_logprobs,
                routed_experts=routed_experts,
            )
        return Emission(
            request_id=group.request.id,
            index=sequence.index,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            routed_experts=routed_experts,
            num_cached_tokens=sequence.num_cached or 0,
        )

    # ---- how sequences leave

    def _end(self, sequences: Iterable[Sequence], reason: str, error: Exception | None) -> list[Emission]:
        """End those that have not ended."""
        return [self._finish(s, reason, error=error) for s in sequences if s.state is not State.DONE]

    def _finish(self, sequence: Sequence, reason: str, **news) -> Emission:
        group, state = sequence.group, sequence.state
        sequence.state = State.DONE
        if state is State.WAITING:
            self._waiting.remove(sequence)
        elif state is State.RUNNING:
            self._leave(sequence)
        group.num_unfinished -= 1
        if sequence.index == 0:
            self._release_siblings(group)
        if not group.num_unfinished:
            del self._groups[group.request.id]
            self._num_queued -= group.queued
        self.stats.finished[reason] += 1
        self.stats.observed.end_to_end.append(self._clock() - group.arrived)
        return Emission(
            request_id=group.request.id,
            index=sequence.index,
            finish_reason=reason,
            num_cached_tokens=sequence.num_cached or 0,
            **news,
        )

    def _release_siblings(self, group: Group) -> None:
        """The first sequence has computed the prompt (or never will): the others may come and reuse its pages."""
        for sequence in group.sequences:
            if sequence.state is State.HELD:
                self._enqueue(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue; tokens of its steps in flight still count."""
        if sequence.state is State.RUNNING:
            self.stats.preemptions += 1
            sequence.state = State.LEAVING
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Plan it no more; slot and pages are given back once the last step that names them has returned."""
        self._slots.live[sequence.slot] = False
        self._prompts.discard(sequence)
        last = int(self._slots.last_step[sequence.slot])
        if last < self._num_returned:
            self._part(sequence)
        else:
            self._parting.setdefault(last, []).append(sequence)

    def _part(self, sequence: Sequence) -> None:
        self._pages.drop(sequence.pages)
        del self._running[sequence.slot]
        self._slots.close(sequence.slot)
        sequence.slot, sequence.pages = -1, []
        if sequence.state is State.LEAVING:
            self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        sequence.slot, sequence.pages = -1, []
        self._waiting.push(sequence)
