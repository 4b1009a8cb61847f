"""A toy stage chain that really executes Steps: slots, page tables, cache contents by page, fed-back tokens. Its "model" picks the
next token by hashing what it finds in the cache, so a page that is reused, released or written wrongly changes the tokens."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from trireme.core.request import Logprobs
from trireme.core.step import FED, PAGE, Outcome, PromptLogprobs, Step, array, ints

VOCAB = 50


def _entry(before: int, token: int, position: int) -> int:
    """What the toy caches for a row: it depends on all rows before, as keys and values of a real model do."""
    return crc32(b"%d %d %d" % (before, token, position)) & 0x7FFFFFFF


def _pick(entries: list[int], seed: int, banned=()) -> int:
    token = crc32(ints([e & 0xFFFF for e in entries]).join([b"", b"%d" % seed])) % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def expected(prompt, *, seed, limit, stops=(), min_tokens=0, bad_words=()) -> tuple[list[int], str]:
    """(output tokens, finish reason) of the toy model alone."""
    log, entries = list(prompt), []
    while True:
        for position in range(len(entries), len(log)):
            entries.append(_entry(entries[-1] if entries else 0, log[position], position))
        output = log[len(prompt) :]
        banned = {
            w[-1] for w in bad_words if len(w) > 1 and tuple(output[len(output) - len(w) + 1 :]) == w[:-1] and len(output) >= len(w) - 1
        }
        if len(output) < min_tokens:
            banned |= set(stops)
        token = _pick(entries, seed, banned)
        if token in stops:
            return output, "stop"
        log.append(token)
        if len(log) >= limit:
            return log[len(prompt) :], "length"


class Toy:
    """All stages in one: runs the steps of an epoch in order. Fails by assertion where a Step breaks the contract."""

    def __init__(self, num_pages: int, inflight: int):
        self.num_pages = num_pages
        self.inflight = inflight
        self.num_rows = 0
        self.join(0)

    def join(self, epoch: int) -> None:
        self.epoch, self.number = epoch, 0
        self.cache = np.full((self.num_pages, PAGE), -1, np.int64)
        self.tables: dict[int, dict[int, int]] = {}
        self.samplings, self.prompt_lens = {}, {}
        self.histories: dict[int, list[int]] = {}
        self.last_token: dict[int, tuple[int, bool]] = {}  # by slot: the token, and whether its step said it returns
        self.writer: dict[tuple[int, int], int] = {}

    def run(self, step: Step) -> Outcome:
        assert (step.epoch, step.number) == (self.epoch, self.number), "steps run in order"
        self.number += 1
        for opened in step.opens:
            self.tables[opened.slot] = {}
            self.samplings[opened.slot], self.prompt_lens[opened.slot] = opened.sampling, opened.prompt_len
            self.histories[opened.slot] = array(opened.history).tolist()
            self.last_token.pop(opened.slot, None)
        for slot, index, page in array(step.page_writes).reshape(-1, 3).tolist():
            self.tables[slot][index] = page
        bans = dict(step.bans)
        slots, tokens = array(step.slots).tolist(), array(step.tokens).tolist()
        assert len(set(slots)) == len(slots) > 0
        sampled, logprobs, prompts, row = [], [], [], 0
        for item, (slot, start, count, samples) in enumerate(
            zip(slots, array(step.starts).tolist(), array(step.counts).tolist(), array(step.samples).tolist(), strict=True)
        ):
            given = tokens[row : row + count]
            row += count
            if FED in given:
                assert count == 1
                token, returns = self.last_token[slot]
                assert returns, "a fed-back token that its step did not return"
                given = [token]
            entries = self.entries(slot, start)
            for position, token in enumerate(given, start):
                assert 0 <= token < VOCAB
                entries.append(_entry(entries[-1] if entries else 0, token, position))
                self.cache[self.tables[slot][position // PAGE], position % PAGE] = entries[-1]
            sampling, prompt_len = self.samplings[slot], self.prompt_lens[slot]
            if sampling.prompt_logprobs is not None and start + 1 < prompt_len:
                ends = range(start + 1, min(start + count + 1, prompt_len))
                log = self.histories[slot]
                prompts.append(PromptLogprobs(slot, start, [Logprobs(log[p], float(-entries[p - 1]), 1, [], []) for p in ends]))
            if samples:
                banned = set(bans.get(item, ()))
                if start + count - prompt_len < sampling.min_tokens:
                    banned |= set(sampling.stop_token_ids)
                token = _pick(entries, sampling.seed, banned)
                self.last_token[slot] = (token, step.returns)
                sampled.append(token)
                logprobs.append(None if sampling.logprobs is None else Logprobs(token, -1.0, 1, [], []))
            else:
                assert item not in bans
        assert row == len(tokens)
        self.num_rows += row
        return Outcome(step.epoch, step.number, 0, ints(sampled), logprobs if any(logprobs) else [], prompts)

    def entries(self, slot: int, count: int) -> list[int]:
        table = self.tables[slot]
        found = [int(self.cache[table[p // PAGE], p % PAGE]) for p in range(count)]
        assert -1 not in found, "a row reads a cache entry that nobody wrote"
        return found
