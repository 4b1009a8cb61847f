"""Drafts by hand: a step's drafts are those that transformers' modules make of the text so far, however many of the last ones stood."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from drafted import DraftOracle
from ranks.by_hand import MAX_LEN, ByHand, Item
from tiny import HYBRID_FAMILIES, greedy_tokens, random_prompts, tiny_checkpoint
from trireme.core.step import array

PROMPTS = random_prompts((30, 1, 16, 50))
NUM_TOKENS = 40
MOST = 4


@pytest.fixture(scope="module", params=HYBRID_FAMILIES)
def model(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), request.param, num_hidden_layers=4)


@pytest.fixture(scope="module")
def greedy(model) -> list[list[int]]:
    return greedy_tokens(model, PROMPTS, NUM_TOKENS)


class Sequence:
    """One slot's way: a prompt, then tokens with drafts made of the known answer, of which any number stands."""

    def __init__(self, slot: int, known: list[int]):
        self.slot, self.text, self._known, self._stands, self._replays = slot, [*PROMPTS[slot]], PROMPTS[slot] + known, 0, 0

    @property
    def goes_on(self) -> bool:
        return len(self.text) + MOST < len(self._known)

    def item(self, chance: random.Random) -> Item:
        if self.text == PROMPTS[self.slot]:
            return Item(self.slot, 0, self.text, 1)
        num_drafts = chance.randint(1, MOST)
        self._stands = chance.randint(0, num_drafts)
        drafts = self._known[len(self.text) :][:num_drafts]
        if self._stands < num_drafts:
            drafts[self._stands] = (drafts[self._stands] + 1) % 251
        return Item(self.slot, len(self.text) - 1, [self.text[-1], *drafts], 1 + num_drafts, self._replays, holds=True)

    def learn(self, item: Item, tokens: list[int]) -> tuple[int, int]:
        """(drafts, how many of them stood)"""
        self.text += tokens[: self._stands + 1]
        self._replays = self._stands + 1 if item.holds else 0
        assert self.text == self._known[: len(self.text)]
        return item.samples - 1, self._stands


@pytest.mark.parametrize("num_stages", [1, 2])
def test_drafts_are_transformers(model, greedy, num_stages):
    """Four sequences join one after another, and cross pages; a step drafts one token to four."""
    oracle, chance, seen = DraftOracle(model), random.Random(0), set()
    stages = ByHand(model, pipeline_parallel_size=num_stages, mtp={"num_tokens": MOST})
    every = [Sequence(slot, known) for slot, known in enumerate(greedy)]
    for number in itertools.count():
        if number < len(every):
            stages.open(number, PROMPTS[number])
        going = [each for each in every[: number + 1] if each.goes_on]
        if not going:
            break
        items, num_drafts = [each.item(chance) for each in going], 1 + number % MOST
        outcome = stages.step(*items, drafts=num_drafts)
        tokens, made = iter(array(outcome.tokens).tolist()), array(outcome.drafts).reshape(len(items), num_drafts)
        for each, item, drafts in zip(going, items, made, strict=True):
            seen.add(each.learn(item, list(itertools.islice(tokens, item.samples))))
            assert drafts.tolist() == oracle.drafts(each.text, num_drafts)
    assert {stood for _, stood in seen} == set(range(MOST + 1))


def test_chunks_and_other_drafts_change_no_draft(model, greedy):
    """A prompt in chunks, and steps that draft less or not at all on the way: keys and values of the head are whole all the same."""
    prompt, known = PROMPTS[3], greedy[3]
    oracle, stages = DraftOracle(model), ByHand(model, mtp={"num_tokens": MOST})
    stages.open(0, prompt)
    for start in range(0, 48, 16):
        stages.step(Item(0, start, prompt[start : start + 16], next=prompt[start + 16]))
    stages.step(Item(0, 48, prompt[48:], 1))
    for at in range(6):
        num_drafts = MOST if at == 5 else at % 2
        drafts = array(stages.step(Item(0, len(prompt) + at, [known[at]], 1), drafts=num_drafts).drafts)
        assert drafts.tolist() == (oracle.drafts(prompt + known[: at + 2], num_drafts) if num_drafts else [])


def test_a_chain_at_the_end_of_the_longest_sequence(model):
    """Its rows have neither pages nor positions of their own beyond it."""
    stages = ByHand(model, mtp={"num_tokens": MOST})
    [prompt, other] = random_prompts((MAX_LEN - 1, 9))
    [[token], [_, second]] = greedy_tokens(model, [prompt], 1) + greedy_tokens(model, [other], 2)
    stages.open(0, prompt)
    stages.open(1, other)
    outcome = stages.step(Item(0, 0, prompt, 1), Item(1, 0, other, 1))
    first = array(outcome.tokens)
    outcome = stages.step(Item(0, MAX_LEN - 1, [first[0]], 1), Item(1, len(other), [first[1]], 1), drafts=MOST)
    assert first[0] == token and array(outcome.tokens)[1] == second
    assert array(outcome.drafts).reshape(2, MOST)[1].tolist() == DraftOracle(model).drafts([*other, first[1], second], MOST)
    assert np.all(array(outcome.drafts) >= 0)
