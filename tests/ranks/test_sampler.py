"""The sampler's rows: each parameter does its part, no row knows of the others, and ranks that have parts of the vocabulary
sample as one that has all of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cut_logits import on_cut, uncut
from trireme.core.request import Sampling
from trireme.core.step import Open, Step, ints
from trireme.parallel.vocabulary import CutLogits
from trireme.ranks.logprobs import CHUNK, Described, Prompts, Stretch
from trireme.ranks.rows import lay_out
from trireme.ranks.sampler import Sampler
from trireme_kernels.choose import Choices

VOCAB = 50
LOGITS = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
PROMPT = [3, 1, 4, 1, 5]


def make_sampler(num_slots: int, vocab: int) -> Sampler:
    choices = Choices("cpu", torch.float32)
    return Sampler(num_slots, vocab, torch.device("cpu"), choices("sample", vocab=vocab), choices("penalise", vocab=vocab))


@pytest.fixture
def sampler():
    return make_sampler(8, VOCAB)


def opened(slot: int, history=PROMPT, **sampling) -> Open:
    return Open(slot, Sampling(**{"max_tokens": 9, "temperature": 0.0} | sampling), len(PROMPT), ints(history))


def draw(sampler, slots, logits=None, positions=None, bans=()):
    slots = np.asarray(slots, dtype=np.int32)
    logits = LOGITS[: len(slots)] if logits is None else logits
    positions = np.full(len(slots), len(PROMPT)) if positions is None else np.asarray(positions)
    return sampler.sample(uncut(logits.clone()), slots, positions, list(bans))


def tokens(*args, **kwargs) -> list[int]:
    return draw(*args, **kwargs).tokens.tolist()


def test_greedy_is_argmax(sampler):
    for slot in range(3):
        sampler.open(opened(slot))
    assert tokens(sampler, [2, 0, 1]) == LOGITS[:3].argmax(-1).tolist()


def test_bans_of_every_kind(sampler):
    first, second, third, fourth = LOGITS[0].topk(4).indices.tolist()
    sampler.open(opened(0, min_tokens=2, stop_token_ids=(first,)))
    assert tokens(sampler, [0], positions=[len(PROMPT) + 1]) == [second]
    assert tokens(sampler, [0], positions=[len(PROMPT) + 2]) == [first]
    sampler.open(opened(0, bad_words=((first,), (second, 7))))
    assert tokens(sampler, [0]) == [second]
    assert tokens(sampler, [0], bans=[(0, [second, third])]) == [fourth]
    sampler.open(opened(0, logit_bias={fourth: 100.0}))
    assert tokens(sampler, [0]) == [fourth]
    sampler.open(opened(0))
    assert tokens(sampler, [0]) == [first]  # a new sequence has nothing of the last one


def test_penalties_count_outputs_and_survive_a_reopening(sampler):
    asked = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.7}
    sampler.open(opened(0, **asked))
    flat = torch.zeros(1, VOCAB)
    flat[0, 1], flat[0, 9] = 2.0, 1.9  # 1 is in the prompt: 2 / 1.3 is less than 1.9
    said = [tokens(sampler, [0], logits=flat)[0] for _ in range(6)]
    assert said[0] == 9
    assert len(set(said)) > 2
    sampler.open(opened(1, history=PROMPT + said, **asked))
    both = [tokens(sampler, [0, 1], logits=flat.repeat(2, 1)) for _ in range(4)]
    assert [first for first, _ in both] == [second for _, second in both]


def test_a_row_does_not_depend_on_its_neighbours(sampler):
    asked = [
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.2, "top_k": 9, "seed": 2**64 - 1},
        {},
        {"temperature": 1.0, "top_p": 0.7, "min_p": 0.01},
    ]
    for slot, sampling in enumerate(asked):
        sampler.open(opened(slot, **sampling))
    places = {3: 8, 1: 9, 2: 10, 0: 11}  # slot -> position
    together = tokens(sampler, list(places), logits=LOGITS[list(places)], positions=list(places.values()))
    alone = [tokens(sampler, [slot], logits=LOGITS[[slot]], positions=[at])[0] for slot, at in places.items()]
    assert together == alone
    assert len({tokens(sampler, [0], positions=[at])[0] for at in range(5, 45)}) > 3


def test_logprobs_are_of_raw_logits(sampler):
    first, second = LOGITS[1].topk(2).indices.tolist()
    sampler.open(opened(0))
    sampler.open(opened(1, logprobs=2, logit_bias={first: -100.0}))
    sampler.open(opened(2, logprobs=0))
    sampled = draw(sampler, [0, 1, 2])
    assert sampled.asked.tolist() == [1, 2]
    one, bare = sampled.describe().read()
    truth = LOGITS.log_softmax(-1)
    assert (one.token, one.rank, one.top_ids) == (second, 2, [first, second])
    assert one.value == pytest.approx(truth[1, second].item(), abs=1e-5)
    assert one.top_values == pytest.approx(truth[1, [first, second]].tolist(), abs=1e-5)
    assert (bare.rank, bare.top_ids) == (1, [])
    assert draw(sampler, [0]).describe() is None


def test_describe_many_rows_in_chunks():
    logits = torch.randn(150, VOCAB)
    chosen = torch.randint(0, VOCAB, (150,))
    found = Described(uncut(logits).select, chosen, np.full(150, 1)).read()
    truth = logits.log_softmax(-1)
    assert [one.value for one in found] == pytest.approx(truth.gather(1, chosen[:, None])[:, 0].tolist(), abs=1e-5)
    assert [one.top_ids[0] for one in found] == logits.argmax(-1).tolist()


def test_the_head_multiplies_few_rows_of_a_prompt_at_a_time():
    """Logits of a whole long prompt would take gigabytes for which no room was measured."""
    normed, head, tokens, asked = torch.randn(200, 16), torch.randn(VOCAB, 16), np.arange(150) % VOCAB, []

    def logits(rows: torch.Tensor) -> CutLogits:
        asked.append(len(rows))
        return uncut(rows @ head.T)

    told = Stretch(3, 7, np.arange(50, 200), tokens, 1).describe(normed[50:], logits)
    truth = (normed[50:] @ head.T).log_softmax(-1)
    assert [one.value for one in told.read()] == pytest.approx(truth[np.arange(150), tokens].tolist(), abs=1e-4)
    assert asked == [CHUNK, CHUNK, 150 - 2 * CHUNK]


def test_prompt_rows_are_all_but_the_last_of_the_prompt():
    prompts = Prompts()
    prompts.open(opened(4, history=[*PROMPT, 11, 12], prompt_logprobs=1))
    prompts.open(opened(5))

    def stretch(slot: int, start: int, count: int):
        step = Step(0, 0, ints([1, slot]), ints([1, start]), ints([1, count]), ints([0, 0]), ints(np.zeros(1 + count)))
        return prompts.stretches(lay_out(step, np.zeros((6, 1), np.int32)))

    (whole,) = stretch(4, 0, 7)  # prefilled again after preemption: outputs are in the log, and are not told
    assert (whole.start, whole.rows.tolist(), whole.tokens.tolist()) == (0, [1, 2, 3, 4], PROMPT[1:])
    (chunk,) = stretch(4, 2, 2)
    assert (chunk.start, chunk.tokens.tolist()) == (2, PROMPT[3:5])
    assert stretch(4, 4, 3) == []
    assert stretch(5, 0, 5) == []


# ---- the vocabulary cut over ranks


def steps_of(logits: CutLogits, asked: list[dict], bans, num_steps: int = 3) -> list:
    """Some steps of all rows: (tokens, logprobs) of each."""
    sampler = make_sampler(len(asked), logits.vocab_size)
    for slot, sampling in enumerate(asked):
        sampler.open(opened(slot, history=[1, 0, 2, 1, 0], **sampling))
    slots, told = np.arange(len(asked), dtype=np.int32), []
    for step in range(num_steps):
        part = CutLogits(logits.local.clone(), logits.vocab_size, logits.along)
        sampled = sampler.sample(part, slots, np.full(len(asked), len(PROMPT) + step), bans)
        described = sampled.describe()
        told.append((sampled.tokens.tolist(), described.read() if described else []))
    return told


def assert_same(found: list, expected: list) -> None:
    for (tokens, logprobs), (true_tokens, true_logprobs) in zip(found, expected, strict=True):
        assert tokens == true_tokens
        for one, other in zip(logprobs, true_logprobs, strict=True):
            assert (one.token, one.rank, one.top_ids) == (other.token, other.rank, other.top_ids)
            assert [one.value, *one.top_values] == pytest.approx([other.value, *other.top_values], abs=1e-5)


def samplings(vocab: int):
    token = st.integers(0, vocab - 1)
    return st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.0, 0.0, 0.3, 1.0, 1.7]), "seed": st.integers(0, 2**63)},
        optional={
            "top_k": st.sampled_from([0, 1, 2, 7, 64, 65, 1000]),
            "top_p": st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
            "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.5]),
            "presence_penalty": st.sampled_from([0.0, 0.8]),
            "frequency_penalty": st.sampled_from([0.0, -0.5]),
            "logit_bias": st.dictionaries(token, st.floats(-9, 9, width=32), max_size=3),
            "bad_words": st.lists(st.tuples(token), max_size=1).map(tuple),
            "min_tokens": st.sampled_from([0, 2]),
            "stop_token_ids": st.lists(token, max_size=1).map(tuple),
            "logprobs": st.sampled_from([None, None, 0, 3]),
        },
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranks_with_parts_sample_as_one_with_all(data):
    """Any mix of parameters, with ties and without; ranks that have little of the vocabulary, or none."""
    vocab, num_ranks = data.draw(st.sampled_from([(251, 2), (251, 4), (50, 4), (50, 3), (5, 4), (3, 4)]))
    asked = data.draw(st.lists(samplings(vocab), min_size=1, max_size=6))
    noise = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits = torch.randn(len(asked), vocab, generator=noise) * data.draw(st.sampled_from([0.0, 1.0, 4.0]))
    if data.draw(st.booleans()):
        logits = (logits * 2).round() / 2
    bans = [(0, [vocab // 2])] if data.draw(st.booleans()) else []
    expected = steps_of(uncut(logits), asked, bans)
    for found in on_cut(logits, num_ranks, lambda part: steps_of(part, asked, bans)):
        assert_same(found, expected)


def test_many_draws_among_few_are_those_of_whole_rows():
    """A vocabulary of which the op looks at a few candidates first; coarse logits, so that top_k and top_p cut among equals."""
    logits = (torch.randn(60, 3000, generator=torch.Generator().manual_seed(3)) * 16).round() / 8
    asked = [
        {"temperature": 0.4 + row % 7 / 5, "top_k": 1 + row, "top_p": [1.0, 0.9, 0.4][row % 3], "min_p": row % 2 / 50, "seed": row}
        for row in range(60)
    ]
    expected = steps_of(uncut(logits), asked, [], num_steps=20)
    assert all(found == expected for found in on_cut(logits, 4, lambda part: steps_of(part, asked, [], num_steps=20)))


def test_only_rows_that_need_it_are_gathered_whole(monkeypatch):
    asked = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"logprobs": 2},
        {"temperature": 1.0, "top_p": 0.9},
        {"frequency_penalty": 0.2},
    ]
    gathered = []
    full = CutLogits.full
    monkeypatch.setattr(CutLogits, "full", lambda self: gathered.append(len(self)) or full(self))
    on_cut(LOGITS[:6], 2, lambda part: steps_of(part, asked, [], num_steps=1))
    assert gathered == [2, 2]  # each rank: the row of top_p alone, and the penalised one
    gathered.clear()
    on_cut(LOGITS[:4], 2, lambda part: steps_of(part, asked[:4], [], num_steps=1))
    assert not gathered


def test_prompt_logprobs_of_parts():
    logits, chosen = torch.randn(100, 251) * 3, torch.randint(0, 251, (100,))
    whole = Described(uncut(logits).select, chosen, np.full(100, 2)).read()
    for found in on_cut(logits, 4, lambda part: Described(part.select, chosen, np.full(100, 2)).read()):
        assert_same([([], found)], [([], whole)])
