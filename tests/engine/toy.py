"""A toy stage chain that really executes Steps: slots, page tables, cache contents by page, states, drafts, fed-back tokens. Its
"model" picks the next token by hashing what it finds in the cache and in its states, so a page that is reused, released or written
wrongly changes the tokens, and so does a row that states take twice, out of turn or not at all."""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32

import numpy as np

from trireme.core.request import Logprobs
from trireme.core.step import FED, PAGE, Outcome, PromptLogprobs, Step, accepted, array, ints

VOCAB = 50


class State(NamedTuple):
    """What a slot keeps besides pages: a digest of its rows, None in a model without states. `num_rows` is known to the test alone."""

    digest: int | None
    num_rows: int = 0

    def take(self, token: int, position: int) -> State:
        assert position == self.num_rows, f"states of {self.num_rows} rows take the row at {position}"
        return State(None if self.digest is None else crc32(b"%d %d" % (self.digest, token)), self.num_rows + 1)


def _entry(before: int, token: int, position: int) -> int:
    """What the toy caches for a row: it depends on all rows before, as keys and values of a real model do."""
    return crc32(b"%d %d %d" % (before, token, position)) & 0x7FFFFFFF


def entries_of(log) -> list[int]:
    """What the toy caches for a whole log."""
    entries: list[int] = []
    for position, token in enumerate(log):
        entries.append(_entry(entries[-1] if entries else 0, token, position))
    return entries


def _pick(entries: list[int], state: State, seed: int, banned=()) -> int:
    seen = ints([e & 0xFFFF for e in entries]) + (b"" if state.digest is None else b"%d" % state.digest)
    token = crc32(seen.join([b"", b"%d" % seed])) % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def expected(prompt, *, seed, limit, stops=(), min_tokens=0, bad_words=(), has_states=False) -> tuple[list[int], str]:
    """(output tokens, finish reason) of the toy model alone."""
    log, entries, state = list(prompt), [], State(0 if has_states else None)
    while True:
        for position in range(len(entries), len(log)):
            entries.append(_entry(entries[-1] if entries else 0, log[position], position))
            state = state.take(log[position], position)
        output = log[len(prompt) :]
        banned = {
            w[-1] for w in bad_words if len(w) > 1 and tuple(output[len(output) - len(w) + 1 :]) == w[:-1] and len(output) >= len(w) - 1
        }
        if len(output) < min_tokens:
            banned |= set(stops)
        token = _pick(entries, state, seed, banned)
        if token in stops:
            return output, "stop"
        log.append(token)
        if len(log) >= limit:
            return log[len(prompt) :], "length"


class Toy:
    """All stages in one: runs the steps of an epoch in order. Fails by assertion where a Step breaks the contract.

    With `num_snapshots` the model has states; with `num_drafts` its last stage drafts: the next tokens, two of three times.
    """

    def __init__(self, num_pages: int, inflight: int, num_snapshots: int | None = None, num_drafts: int = 0):
        self.num_pages = num_pages
        self.inflight = inflight
        self.num_snapshots, self.num_drafts = num_snapshots, num_drafts
        self.num_rows = 0
        self.join(0)

    def join(self, epoch: int) -> None:
        self.epoch, self.number = epoch, 0
        self.cache = np.full((self.num_pages, PAGE), -1, np.int64)
        self.tables: dict[int, dict[int, int]] = {}
        self.samplings, self.prompt_lens = {}, {}
        self.histories: dict[int, list[int]] = {}
        self.last_token: dict[int, tuple[int, bool]] = {}  # by slot: the token, and whether its step said it returns
        self.last_rows: dict[int, tuple[int, int]] = {}  # by slot: rows that its last step sampled, and drafts among them that stood
        self.states: dict[int, State] = {}
        self.held: dict[int, list[int]] = {}  # by slot: tokens whose rows its states have not taken
        self.snapshots: dict[int, State] = {}
        self.drafts: dict[int, list[int]] = {}  # by slot: of the last step that sampled it
        self.next_token: dict[int, int] = {}  # by slot: what the front said would follow its last row

    def run(self, step: Step) -> Outcome:
        assert (step.epoch, step.number) == (self.epoch, self.number), "steps run in order"
        self.number += 1
        for opened in step.opens:
            slot = opened.slot
            self.tables[slot] = {}
            self.samplings[slot], self.prompt_lens[slot] = opened.sampling, opened.prompt_len
            self.histories[slot] = array(opened.history).tolist()
            for left in (self.last_token, self.last_rows, self.states, self.held, self.drafts, self.next_token):
                left.pop(slot, None)
        for slot, index, page in array(step.page_writes).reshape(-1, 3).tolist():
            self.tables[slot][index] = page
        for snapshot, slot in self.pairs(step.restores):
            assert slot not in self.states, "states are restored where a slot is opened"
            self.states[slot] = self.snapshots[snapshot]
        bans = dict(step.bans)
        slots, tokens = array(step.slots).tolist(), array(step.tokens).tolist()
        assert len(set(slots)) == len(slots) > 0
        assert 0 <= step.drafts <= self.num_drafts
        fields = [self.of_items(step, name) for name in ("starts", "counts", "samples", "replays", "holds", "nexts")]
        sampled, logprobs, prompts, drafts, routed, row = [], [], [], [], [], 0
        for item, (slot, start, count, samples, replays, holds, follows) in enumerate(zip(slots, *fields, strict=True)):
            given = tokens[row : row + count]
            row += count
            if item in array(step.unsettled):
                start, given, replays = self.settle(slot, start, given, replays)
            assert samples in (0, 1) or samples == count <= 1 + self.num_drafts
            given = self.check_tokens(slot, given, samples, follows)
            entries = self.entries(slot, start)
            states = [self.begin(slot, start, replays)]  # before the item, and after each of its rows
            for position, token in enumerate(given, start):
                assert 0 <= token < VOCAB
                entries.append(_entry(entries[-1] if entries else 0, token, position))
                self.cache[self.tables[slot][position // PAGE], position % PAGE] = entries[-1]
                states.append(states[-1].take(token, position))
            if self.num_snapshots is not None:
                assert holds == (samples > 1), "a token and drafts are held, and nothing else is"
                self.states[slot] = states[0 if holds else -1]
                if holds:
                    self.held[slot] = given
            if item in array(step.routed):
                routed += enumerate(given, start)
            sampling, prompt_len = self.samplings[slot], self.prompt_lens[slot]
            if sampling.prompt_logprobs is not None and start + 1 < prompt_len:
                ends = range(start + 1, min(start + count + 1, prompt_len))
                log = self.histories[slot]
                prompts.append(PromptLogprobs(slot, start, [Logprobs(log[p], float(-entries[p - 1]), 1, [], []) for p in ends]))
            assert samples == 1 or item not in bans
            new = []
            for done in range(count - samples + 1, count + 1):
                banned = set(bans.get(item, ()))
                if start + done - prompt_len < sampling.min_tokens:
                    banned |= set(sampling.stop_token_ids)
                new.append(_pick(entries[: start + done], states[done], sampling.seed, banned))
            if samples:
                stands = accepted(np.array(given[1:] if samples > 1 else []), np.array(new))
                self.last_token[slot], self.last_rows[slot] = (new[stands], step.returns), (samples, stands)
                done = count - samples + 1 + stands
                self.drafts[slot] = self.draft(entries[: start + done], states[done], new[stands], sampling.seed, step.drafts)
                drafts += self.drafts[slot]
                sampled += new
                logprobs += [None if sampling.logprobs is None else Logprobs(token, -1.0, 1, [], []) for token in new]
        assert row == len(tokens)
        saves = self.pairs(step.saves)
        assert len({snapshot for _, snapshot in saves}) == len(saves)
        for slot, snapshot in saves:
            assert 0 <= snapshot < (self.num_snapshots or 0) and slot not in self.held and self.states[slot].num_rows % PAGE == 0
            self.snapshots[snapshot] = self.states[slot]
        self.num_rows += row
        asked = any(value is not None for value in logprobs)
        experts = np.array(routed, np.int16).tobytes()  # of a row its position and its token
        return Outcome(
            step.epoch, step.number, 0, ints(sampled), logprobs if asked else [], prompts, drafts=ints(drafts), routed_experts=experts
        )

    def of_items(self, step: Step, name: str) -> list[int]:
        """A field of the step by item; zeros where this model does not need it."""
        packed = getattr(step, name)
        needs = {"replays": self.num_snapshots is not None, "holds": self.num_snapshots is not None, "nexts": self.num_drafts > 0}
        if not needs.get(name, True):
            assert not packed
            return [0] * step.num_items
        return array(packed).tolist()

    def pairs(self, packed: bytes) -> list[tuple[int, int]]:
        assert not packed or self.num_snapshots
        return [(a, b) for a, b in array(packed).reshape(-1, 2).tolist()]

    def settle(self, slot: int, start: int, given: list[int], replays: int) -> tuple[int, list[int], int]:
        """(start, tokens, rows to replay) of an item that was planned before its slot's last one had told what stands."""
        (token, returns), (rows, stands) = self.last_token[slot], self.last_rows[slot]
        assert returns and set(given) == {FED} and not replays and len(given) <= 1 + len(self.drafts[slot])
        return start + stands, [token, *self.drafts[slot]][: len(given)], 1 + stands if rows > 1 and self.num_snapshots is not None else 0

    def check_tokens(self, slot: int, given: list[int], samples: int, follows: int) -> list[int]:
        """The item's tokens, the fed-back one filled in."""
        token, returns = self.last_token.get(slot, (-1, False))
        if FED in given:
            assert given == [FED] and returns and self.last_rows[slot][0] == 1, "a fed-back token that its step did not return"
            given = [token]
        assert token in (-1, given[0]), "a decode begins with the token that was sampled last"
        assert given[0] == self.next_token.pop(slot, given[0]), "another token came than was said to"
        if samples > 1:
            assert given[1:] == self.drafts[slot][: samples - 1]
        if self.num_drafts:
            assert (follows == -1) == (samples > 0)
            if not samples:
                self.next_token[slot] = follows
        return given

    def begin(self, slot: int, start: int, replays: int) -> State:
        """A slot's states when its item begins."""
        if self.num_snapshots is None:
            return State(None, start)
        held = self.held.pop(slot, [])
        assert bool(held) == (replays > 0), "the item after one that was held replays, and no other does"
        assert replays <= len(held)
        state = State(0) if start == 0 else self.states[slot]
        for token in held[:replays]:
            state = state.take(token, state.num_rows)
        assert state.num_rows == start
        return state

    def draft(self, entries: list[int], state: State, token: int, seed: int, count: int) -> list[int]:
        drafts, entries = [], list(entries)
        for _ in range(count):
            state = state.take(token, len(entries))
            entries.append(_entry(entries[-1], token, len(entries)))
            token = _pick(entries, state, seed)
            if entries[-1] % 3 == 0:
                token = (token + 1) % VOCAB
            drafts.append(token)
        return drafts

    def entries(self, slot: int, count: int) -> list[int]:
        table = self.tables[slot]
        found = [int(self.cache[table[p // PAGE], p % PAGE]) for p in range(count)]
        assert -1 not in found, "a row reads a cache entry that nobody wrote"
        return found
