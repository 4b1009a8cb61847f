"""Drafts by hand: a step's drafts are those that transformers' modules make of the text so far, however many of the last ones stood."""

import random
from pathlib import Path

import numpy as np
import pytest

from drafted import DraftOracle
from ranks.by_hand import MAX_LEN, ByHand, Item
from tiny import HYBRID_FAMILIES, greedy_tokens, random_prompts, tiny_checkpoint
from trireme.core.step import array

PROMPTS = random_prompts((30, 1, 16, 50))
NUM_TOKENS = 20
MOST = 4


@pytest.fixture(scope="module", params=HYBRID_FAMILIES)
def model(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), request.param, num_hidden_layers=4)


@pytest.fixture(scope="module")
def greedy(model) -> list[list[int]]:
    return greedy_tokens(model, PROMPTS, NUM_TOKENS)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_drafts_are_transformers(model, greedy, num_stages):
    """Four sequences join one after another, and cross pages. Of the drafts that are verified any number stands, from none to all,
    and all numbers do: they are made of the known answer here."""
    oracle, chance = DraftOracle(model), random.Random(0)
    stages = ByHand(model, pipeline_parallel_size=num_stages, mtp={"num_tokens": MOST})
    answers: list[list[int]] = [[] for _ in PROMPTS]
    held: list[tuple[int, int]] = [(0, 0)] * len(PROMPTS)  # of each slot's last item: rows replayed by its next one, drafts
    stood, compared = set(), 0
    for number in range(40):
        if number < len(PROMPTS):
            stages.open(number, PROMPTS[number])
        items, nums = [], []
        for slot in range(min(number + 1, len(PROMPTS))):
            prompt, answer, known = PROMPTS[slot], answers[slot], greedy[slot]
            if len(answer) >= NUM_TOKENS - 1 - MOST:
                continue
            if not answer:
                items.append(Item(slot, 0, prompt, 1))
                nums.append(0)
                continue
            num_drafts, num = chance.randint(1, MOST), 0
            num = chance.randint(0, num_drafts)
            drafts = known[len(answer) : len(answer) + num_drafts]
            if num < num_drafts:
                drafts[num] = (drafts[num] + 1) % 251
            items.append(
                Item(slot, len(prompt) + len(answer) - 1, [answer[-1], *drafts], 1 + num_drafts, replays=held[slot][0], holds=True)
            )
            nums.append(num)
            stood.add((num, num_drafts))
        if not items:
            break
        num_drafts = 1 + number % MOST
        outcome = stages.step(*items, drafts=num_drafts)
        made, tokens, at = array(outcome.drafts).reshape(len(items), num_drafts), array(outcome.tokens), 0
        for item, num, drafts in zip(items, nums, made, strict=True):
            answers[item.slot] += tokens[at : at + num + 1].tolist()
            held[item.slot] = (num + 1 if item.holds else 0, item.samples - 1)
            at += item.samples
            text = PROMPTS[item.slot] + answers[item.slot]
            assert len(text) < MAX_LEN and answers[item.slot] == greedy[item.slot][: len(answers[item.slot])]
            assert drafts.tolist() == oracle.drafts(text, num_drafts)
            compared += num_drafts
    assert {num for num, _ in stood} == set(range(MOST + 1)) and compared > 60


def test_chunks_and_other_drafts_change_no_draft(model, greedy):
    """A prompt in chunks, and steps that draft less or not at all on the way: keys and values of the head are whole all the same."""
    [prompt, known] = PROMPTS[3], greedy[3]
    oracle, stages = DraftOracle(model), ByHand(model, mtp={"num_tokens": MOST})
    stages.open(0, prompt)
    for start in range(0, 48, 16):
        stages.step(Item(0, start, prompt[start : start + 16], next=prompt[start + 16]))
    stages.step(Item(0, 48, prompt[48:], 1))
    for at in range(6):
        drafts = MOST if at == 5 else at % 2
        outcome = stages.step(Item(0, len(prompt) + at, [known[at]], 1), drafts=drafts)
        assert len(array(outcome.drafts)) == drafts
        assert array(outcome.drafts).tolist() == oracle.drafts(prompt + known[: at + 2], drafts) if drafts else True


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
