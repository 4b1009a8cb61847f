"""Steps by hand: drafts that stand and that do not, states replayed and restored. The tokens are transformers' all the same."""

import random
from pathlib import Path

import numpy as np
import pytest

from ranks.by_hand import NUM_SLOTS, ByHand, Item
from tiny import greedy_tokens, prompt_logits, random_prompts, tiny_checkpoint
from trireme.core.step import PAGE, accepted, array

FAMILIES = ("llama", "qwen3_5", "qwen3_next")
PROMPTS = random_prompts((37, 1, 16, 50))
NUM_TOKENS = 20


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), request.param, num_hidden_layers=4)


@pytest.fixture(scope="module")
def greedy(model) -> list[list[int]]:
    return greedy_tokens(model, PROMPTS, NUM_TOKENS)


class Sequence:
    """One slot's way: its prompt in chunks, then tokens with as many drafts as it likes."""

    def __init__(self, slot: int, prompt: list[int], known: list[int], seed: int, most_drafts: int):
        self.slot, self.prompt, self.known = slot, prompt, known  # known: the answer, of which drafts are made
        self.chance, self.most_drafts = random.Random(seed), most_drafts
        self.answer: list[int] = []
        self.done, self.replays, self.drafts = 0, 0, []

    def item(self) -> Item:
        text = self.prompt + self.answer
        if self.done < len(self.prompt):
            tokens = self.prompt[self.done : self.done + self.chance.randint(1, 24)]
            item = Item(self.slot, self.done, tokens, samples=self.done + len(tokens) == len(self.prompt))
            self.done += len(tokens)
            return item
        coming = self.known[len(self.answer) :][: self.chance.randint(0, self.most_drafts)]
        self.drafts = [token if self.chance.random() < 0.7 else (token + 1) % 251 for token in coming]
        tokens = [*text[self.done :], *self.drafts]
        return Item(self.slot, self.done, tokens, 1 + len(self.drafts), self.replays, holds=bool(self.drafts))

    def learn(self, item: Item, tokens: np.ndarray) -> list[int]:
        """-> which of the tokens count"""
        if not item.samples:
            return []
        num = accepted(np.array(self.drafts), tokens) if item.holds else 0
        self.replays = num + 1 if item.holds else 0
        if item.start >= len(self.prompt):
            self.done += num + 1
        self.drafts = []
        self.answer += tokens[: num + 1].tolist()
        return list(range(num + 1))


def answers(stages: ByHand, known: list[list[int]], most_drafts: int, seed: int = 0, **sampling) -> tuple[list[list[int]], list]:
    """(tokens, their logprobs) of all prompts, each joined one step after the one before."""
    stages.begin()
    going = [Sequence(slot, prompt, known[slot], seed + slot, most_drafts) for slot, prompt in enumerate(PROMPTS)]
    told = [[] for _ in going]
    steps = 0
    while any(len(each.answer) < NUM_TOKENS for each in going):
        batch = [each for each in going if each.slot <= steps and len(each.answer) < NUM_TOKENS]
        if steps < len(PROMPTS):
            stages.open(steps, PROMPTS[steps], **sampling)
        items = [each.item() for each in batch]
        outcome = stages.step(*items)
        at = 0
        for each, item in zip(batch, items, strict=True):
            tokens = array(outcome.tokens)[at : at + item.samples]
            assert len(tokens) == item.samples
            told[each.slot] += [outcome.logprobs[at + row] for row in each.learn(item, tokens) if outcome.logprobs]
            at += item.samples
        steps += 1
    return [each.answer[:NUM_TOKENS] for each in going], [each[:NUM_TOKENS] for each in told]


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("most_drafts", [0, 1, 3])
def test_drafts_change_nothing(model, greedy, pp, most_drafts):
    stages = ByHand(model, pipeline_parallel_size=pp)
    for seed in range(3 if most_drafts else 1):
        found, _ = answers(stages, greedy, most_drafts, seed)
        assert found == greedy


def test_every_sampled_row_has_its_own_random_numbers_and_logprobs(model):
    stages = ByHand(model)
    drawn = {"temperature": 0.9, "top_p": 0.9, "seed": 11, "logprobs": 2}
    plain, told = answers(stages, [[] for _ in PROMPTS], 0, **drawn)
    drafted, told_too = answers(stages, plain, 3, **drawn)
    assert drafted == plain
    assert [[each.token for each in one] for one in told_too] == plain
    for one, other in zip(told, told_too, strict=True):
        assert [each.value for each in one] == pytest.approx([each.value for each in other], abs=1e-4)
    truth = prompt_logits(model, PROMPTS[0] + plain[0])[len(PROMPTS[0]) - 1 : -1].log_softmax(-1)
    assert [each.value for each in told_too[0]] == pytest.approx([truth[i, t].item() for i, t in enumerate(plain[0])], abs=1e-4)


@pytest.mark.parametrize("pp", [1, 2])
def test_a_sequence_goes_on_from_a_snapshot(model, greedy, pp):
    """Slot 3 saves after two pages and is overwritten by another prompt; slot 1 goes on from there, in slot 3's pages."""
    stages, prompt, cut = ByHand(model, pipeline_parallel_size=pp), PROMPTS[3], 2 * PAGE
    stages.open(3, prompt)
    stages.step(Item(3, 0, prompt[:20]))
    stages.step(Item(3, 20, prompt[20:cut]), saves=[(3, 2)])
    stages.step(Item(3, cut, prompt[cut:], samples=1))
    stages.open(2, PROMPTS[0])
    stages.step(Item(2, 0, PROMPTS[0], samples=1), saves=[(2, 0), (3, 1)])
    stages.open(1, prompt, shares=(3, 2))
    stages.open(0, PROMPTS[2])
    outcome = stages.step(Item(0, 0, PROMPTS[2], samples=1), Item(1, cut, prompt[cut:], samples=1), restores=[(2, 1)], saves=[(1, 2)])
    found = [array(outcome.tokens).tolist()]
    for index in range(NUM_TOKENS - 1):
        items = [Item(slot, len(PROMPTS[of]) + index, [found[-1][slot]], samples=1) for slot, of in ((0, 2), (1, 3))]
        found.append(array(stages.step(*items).tokens).tolist())
    assert [list(each) for each in zip(*found, strict=True)] == [greedy[2], greedy[3]]


def test_a_stage_says_what_it_has_room_for(model):
    """The first of a hybrid model's stages has no attention here, the last no states."""
    first, last = ByHand(model, pipeline_parallel_size=2, layer_cut=[2, 2], num_pages=None).runners
    hybrid = "linear_attention" in (model / "config.json").read_text()
    assert (first.num_snapshots, last.num_snapshots) == (NUM_SLOTS if hybrid else None, None)
    assert (first.num_pages > last.num_pages) == hybrid
