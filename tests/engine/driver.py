"""Drives a Scheduler against the toy with random delays, reordering, cancels and faults, and checks every contract on the way."""

from __future__ import annotations

import random
from collections import defaultdict

from engine.toy import VOCAB, Toy, entries_of, expected
from trireme.core.request import Emission, Request, Sampling
from trireme.core.settings import Limits
from trireme.core.step import PAGE, Step, array
from trireme.engine.scheduler import Scheduler


def limits(**given) -> Limits:
    return Limits(**{"max_model_len": 200, "num_pages": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64, **given})


def make_request(rng: random.Random, name: str, *, longest=90, **given) -> Request:
    """A random prompt, often with a beginning that others share; now and then a feature that takes another path."""
    shared = [7] * rng.choice([0, 0, 16, 33, 50])
    prompt = (shared + [rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))])[:longest]
    sampling = {
        "max_tokens": rng.randint(1, 30),
        "seed": rng.choice([0, 1]),
        "stop_token_ids": tuple(rng.sample(range(VOCAB), rng.choice([0, 1, 3]))),
        "min_tokens": rng.choice([0, 0, 5]),
        "n": rng.choice([1, 1, 1, 3]),
        "bad_words": tuple((a, b) for a in range(0, VOCAB, 2) for b in range(9)) if rng.random() < 0.2 else (),
        "prompt_logprobs": rng.choice([None, None, None, 0]),
        "presence_penalty": rng.choice([0.0, 0.0, 0.0, 0.5]),  # which the toy does not heed
        "logprobs": rng.choice([None, 0]),
    }
    sampling["min_tokens"] = min(sampling["min_tokens"], sampling["max_tokens"])
    routed = rng.random() < 0.3
    return Request(id=name, prompt=prompt, sampling=Sampling(**sampling), priority=rng.choice([0, 0, 1]), routed_experts=routed, **given)


class Driver:
    def __init__(self, limits: Limits, seed: int = 0):
        self.now = 0.0
        self.rng = random.Random(seed)
        self.scheduler = Scheduler(limits, clock=lambda: self.now)
        self.toy = Toy(limits.num_pages, limits.inflight, limits.num_snapshots, limits.num_drafts)
        self.posted = []  # not run yet
        self.answers = []  # run, not learned
        self.named: dict[int, dict[int, set[int]]] = {}  # pages by slot, by number of a step that has not returned
        self.requests: dict[str, Request] = {}
        self.emissions: dict[tuple[str, int], list[Emission]] = defaultdict(list)
        self.steps = []
        self.decoding: set[int] = set()  # slots that a step of this epoch has sampled since they were opened

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.requests[request.id] = request

    def plan(self) -> bool:
        step = self.scheduler.next()
        if step is None:
            return False
        limits = self.scheduler.limits
        assert len(self.named) < limits.inflight
        assert step.num_rows <= limits.max_num_batched_tokens
        starts = dict(zip(array(step.slots).tolist(), array(step.starts).tolist(), strict=True))
        for opened in step.opens:
            assert all(opened.slot not in slots for slots in self.named.values()), "a slot was opened that a step in flight names"
        for slot, index, page in array(step.page_writes).reshape(-1, 3).tolist():
            if (index + 1) * PAGE > starts[slot]:
                holders = [number for number, slots in self.named.items() if any(page in pages for pages in slots.values())]
                assert not holders, f"page {page} goes to another while steps {holders} name it"
        self.check_regime(step)
        self.check_drafts(step)
        self.named[step.number] = {s.slot: set(s.pages) for s in self.scheduler._flights[-1].sequences if s.slot >= 0}
        self.posted.append(step)
        self.steps.append(step)
        return True

    def check_regime(self, step: Step) -> None:
        limits, counts = self.scheduler.limits, array(step.counts).tolist()
        assert step.sp == (limits.sp_from is not None and step.num_rows >= limits.sp_from)
        self.decoding -= {opened.slot for opened in step.opens}
        slots = array(step.slots).tolist()
        is_decode = [slot in self.decoding for slot in slots]
        assert limits.cp == 1 or len(set(is_decode)) == 1, "decodes and prompts in one step"
        assert sum(is_decode) <= (limits.max_micro_batch_size or len(slots))
        long = sum(count for count, decodes in zip(counts, is_decode, strict=True) if count >= 2 * limits.cp and not decodes)
        assert step.cp == (limits.cp > 1 and long >= step.num_rows / 2)
        self.decoding |= {slot for slot, samples in zip(slots, array(step.samples).tolist(), strict=True) if samples}

    def check_drafts(self, step: Step) -> None:
        """A sequence with drafts is sampled by no other step, or unsettled and by one, and never past its limit."""
        *others, flight = self.scheduler._flights
        fields = [array(packed).tolist() for packed in (step.slots, step.starts, step.counts, step.samples)]
        unsettled = array(step.unsettled)
        for item, (sequence, slot, start, count, samples) in enumerate(zip(flight.sequences, *fields, strict=True)):
            in_flight = sum(slot in other.sampled for other in others)
            assert item not in unsettled or in_flight
            assert not samples or start + count < sequence.limit
            if samples > 1:
                assert in_flight == (item in unsettled)
                assert not (sequence.sampling.penalises or sequence.sampling.waits_for_token or sequence.prompt_logprobs)

    def run_one(self) -> None:
        if self.posted:
            self.answers.append(self.toy.run(self.posted.pop(0)))

    def learn_one(self) -> None:
        if self.answers:
            answer = self.answers.pop(self.rng.randrange(len(self.answers)))
            self.hear(self.scheduler.learn(answer))
            for number in [n for n in self.named if n < self.scheduler._num_returned]:
                del self.named[number]
            if self.rng.random() < 0.2:
                self.check_named()

    def check_named(self) -> None:
        """Pages that reuse can see hold the rows of the log that they are named after."""
        for sequence in self.scheduler._running.values():
            pages = sequence.pages[: sequence.num_named]
            assert self.toy.cache[pages].reshape(-1).tolist() == entries_of(sequence.log[: len(pages) * PAGE])

    def fault(self, num_pages: int | None = None, error: Exception | None = None) -> None:
        epoch = self.scheduler.epoch + 1
        late = self.answers
        self.posted, self.answers, self.named, self.decoding = [], [], {}, set()
        self.hear(self.scheduler.restart(epoch, num_pages, error))
        for answer in late:
            assert self.scheduler.learn(answer) == [], "an answer of a dead epoch counts for nothing"
        self.toy.join(epoch)

    def hear(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            heard = self.emissions[emission.request_id, emission.index]
            assert not (heard and heard[-1].finish_reason), "news of a sequence that has ended"
            heard.append(emission)

    def finish(self, most: int = 20_000) -> None:
        """Until nothing is left, in random order."""
        for _ in range(most):
            self.now += 0.001
            moved = self.rng.choice([self.plan, self.run_one, self.learn_one])()
            if not (self.scheduler._groups or self.named):
                break
            if moved is False and not self.posted and not self.answers:
                raise AssertionError("nothing is in flight and nothing can be planned")
        else:
            raise AssertionError("no end in sight")
        self.check()

    def rush(self) -> None:
        """Until nothing is left, with as many steps in flight as may be."""
        while self.scheduler._groups or self.named:
            while self.plan():
                pass
            assert self.posted or self.answers, "nothing is in flight and nothing can be planned"
            self.run_one()
            self.learn_one()
        self.check()

    def output(self, name: str, index: int = 0) -> list[int]:
        return [token for emission in self.emissions[name, index] for token in emission.tokens]

    def check(self) -> None:
        """Everything that ended has the tokens of the toy alone, and nothing is left."""
        for request in self.requests.values():
            sampling = request.sampling
            for index in range(sampling.n):
                heard = self.emissions[request.id, index]
                tokens, reason = expected(
                    request.prompt,
                    seed=sampling.seed + index,
                    limit=min(len(request.prompt) + sampling.max_tokens, self.scheduler.limits.max_model_len),
                    stops=sampling.stop_token_ids,
                    min_tokens=sampling.min_tokens,
                    bad_words=sampling.bad_words,
                    has_states=self.scheduler.limits.num_snapshots is not None,
                )
                got = self.output(request.id, index)
                if heard[-1].finish_reason in ("stop", "length") and heard[-1].finish_reason == reason:
                    assert got == tokens
                else:
                    assert heard[-1].finish_reason in ("cancelled", "deadline", "error")
                    assert got == tokens[: len(got)]
                if sampling.logprobs is not None:
                    assert [p.token for e in heard for p in e.logprobs] == got
                if sampling.prompt_logprobs is not None and index == 0 and (got or heard[-1].finish_reason == "stop"):
                    (values,) = [e.prompt_logprobs for e in heard if e.prompt_logprobs is not None]
                    assert [v and v.token for v in values] == [None, *request.prompt[1:]]
                told = [pair for e in heard if e.routed_experts is not None for pair in e.routed_experts.tolist()]
                if request.routed_experts:
                    num_told = len(request.prompt) + len(got) - (heard[-1].finish_reason != "stop") if got else len(told)
                    assert len(told) >= num_told, "all rows that were computed for what it got"
                    assert all(pair == [at, ([*request.prompt, *tokens])[at]] for at, pair in enumerate(told[:num_told]))
                else:
                    assert not told
        scheduler = self.scheduler
        assert (scheduler.num_pages_used, scheduler.num_running, scheduler.num_waiting, scheduler.num_queued) == (0, 0, 0, 0)
        assert scheduler._slots.num_free == scheduler.limits.max_num_seqs
        assert not (scheduler._parting or scheduler._prompts or scheduler._early or scheduler._prompt_rows_in_flight)
        assert not scheduler._waiting.num_rows
