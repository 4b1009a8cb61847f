"""Drafts change nothing: the engine with real ranks and a head that drafts gives transformers' greedy tokens, the tokens that a seed
gives without it, and the distribution that transformers' probabilities say."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import psutil
import pytest
import torch

from drafted import draft_well
from plans.grid import settings_of
from plans.test_plans import make_prompts
from plans.whole import assert_same_tokens, emissions_of, kill_at, tokens_of
from tiny import greedy_tokens, oracle, random_prompts, tiny_checkpoint
from trireme.core.request import Request, Sampling
from trireme.core.settings import Settings, make_settings
from trireme.engine.chain import Chain
from trireme_tools import offline

pytestmark = pytest.mark.ranks

SIZES = {"num_attention_heads": 12, "num_key_value_heads": 2, "num_hidden_layers": 4, "moe_intermediate_size": 24}
SURENESS = {"qwen3_5": 1.0, "qwen3_5_moe": 0.9, "qwen3_next": 0.8}  # so that of four drafts any number may stand
NUM_TOKENS = 24
PROMPTS = make_prompts()
CASES = [
    ("qwen3_5", "one", 1, {}),
    ("qwen3_5", "one", 2, {"max_num_batched_tokens": 16, "async_depth": 0}),
    ("qwen3_5", "one", 3, {"num_pages": 24, "max_num_batched_tokens": 64}),
    ("qwen3_5", "pp2", 4, {}),
    ("qwen3_5", "pp2", 3, {"link": "tensor", "max_num_batched_tokens": 32}),
    ("qwen3_5", "tp2", 2, {}),
    ("qwen3_5", "cp2", 3, {"max_num_batched_tokens": 64}),
    ("qwen3_5", "pp2 tp2 sp", 3, {"max_num_batched_tokens": 48}),
    ("qwen3_5_moe", "tp2 ep2", 3, {}),
    ("qwen3_5_moe", "pp2 tp2 ep2 sp dispatched", 2, {"num_pages": 24}),
    ("qwen3_next", "one", 4, {"async_depth": 2}),
    ("qwen3_next", "pp2", 1, {"num_pages": 24, "async_depth": 2}),
    ("qwen3_next", "pp2 cp2", 4, {"enable_prefix_caching": False}),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: draft_well(tiny_checkpoint(root / family, family, **SIZES), sureness=sure) for family, sure in SURENESS.items()}


@pytest.fixture(scope="module")
def expected(checkpoints) -> dict[str, list[list[int]]]:
    return {family: greedy_tokens(folder, PROMPTS, NUM_TOKENS) for family, folder in checkpoints.items()}


def settings(folder: Path, plan: str, num_drafts: int, **values) -> Settings:
    base = {"model": str(folder), "max_model_len": 256, "max_num_seqs": 8, "num_pages": 200, "threads_per_rank": 1}
    mtp = {"num_tokens": num_drafts, "adaptive": False}
    return make_settings({**base, "mtp": mtp, **settings_of("" if plan == "one" else plan), **values})


@pytest.mark.parametrize(("family", "plan", "num_drafts", "values"), CASES)
def test_greedy_tokens_are_transformers(pool, checkpoints, expected, monkeypatch, family, plan, num_drafts, values):
    """Twice, so that the second time there are pages and states to reuse; with few pages sequences are preempted. Most steps that
    verify are planned before the one before them is answered."""
    folder, greedy = checkpoints[family], Sampling(max_tokens=NUM_TOKENS, temperature=0.0)
    unsettled, send = [], Chain.send
    monkeypatch.setattr(Chain, "send", lambda self, step, timeout_s: (unsettled.append(bool(step.unsettled)), send(self, step, timeout_s)))
    with offline.running(settings(folder, plan, num_drafts, **values), pool) as engine:
        for time in ("first", "again"):
            requests = [Request(id=f"{time} {i}", prompt=prompt, sampling=greedy) for i, prompt in enumerate(PROMPTS)]
            answers = emissions_of(engine, requests)
            assert all(answer[-1].error is None for answer in answers)
            found = [[token for emission in answer for token in emission.tokens] for answer in answers]
            assert_same_tokens(folder, PROMPTS, found, expected[family])
            came = {len(emission.tokens) for answer in answers for emission in answer if emission.finish_reason is None}
            assert came == set(range(1, num_drafts + 2)), "any number of drafts stood, and as many rows were replayed"
        stats = engine.stats
        assert 0 < stats.accepted_tokens < stats.drafted_tokens <= stats.verifications * num_drafts
        assert stats.preemptions > 0 or "num_pages" not in values, "the pool is meant to be too small"
        assert any(unsettled) == (values.get("async_depth") != 0 and values.get("link") != "tensor")
        assert (stats.cp_steps > 0) == ("cp" in plan) and (stats.sp_steps > 0) == ("sp" in plan.split())


@pytest.mark.parametrize("plan", ["one", "pp2 tp2"])
def test_seeds_give_the_tokens_that_they_give_without_drafts(pool, checkpoints, plan):
    """And the same logprobs, ends of sequence amid drafts, and lengths; requests whose tokens must wait for each other among them."""
    ways = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 5, "logprobs": 2},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.3, "stop_token_ids": tuple(range(3, 60))},
        {"temperature": 0.5, "min_p": 0.05, "min_tokens": 6, "stop_token_ids": tuple(range(2, 250, 2))},
        {"temperature": 0.5, "frequency_penalty": 0.5},
        {"temperature": 0.5, "bad_words": ((5, 6), (7,))},
        {"temperature": 0.5, "logit_bias": {9: 3.0}},
        {"temperature": 0.0, "prompt_logprobs": 1},
    ]
    asked = [prompt for prompt in PROMPTS if len(prompt) > 1]
    requests = [
        Request(id=f"{i} {j}", prompt=asked[(i + j) % len(asked)], sampling=Sampling(max_tokens=18 + j, seed=100 * i + j, **way))
        for i, way in enumerate(ways)
        for j in range(3)
    ]
    heard, stats = [], []
    for num_drafts in (0, 3):
        with offline.running(settings(checkpoints["qwen3_5"], plan, num_drafts), pool) as engine:
            heard.append(emissions_of(engine, requests))
            stats.append(engine.stats)
    assert stats[0].verifications == 0 and 0 < stats[1].accepted_tokens < stats[1].drafted_tokens
    for without, with_drafts in zip(*heard, strict=True):
        assert with_drafts[-1].error is None
        tokens = [[token for emission in answer for token in emission.tokens] for answer in (without, with_drafts)]
        assert tokens[0] == tokens[1] and without[-1].finish_reason == with_drafts[-1].finish_reason
        told = [[each for emission in answer for each in emission.logprobs] for answer in (without, with_drafts)]
        assert [each.token for each in told[0]] == [each.token for each in told[1]] and len(told[0]) in (0, len(tokens[0]))
        assert [each.value for each in told[0]] == pytest.approx([each.value for each in told[1]], abs=1e-4)
        assert [each.top_ids for each in told[0]] == [each.top_ids for each in told[1]]


def test_sampled_tokens_keep_their_distribution(pool, tmp_path):
    """Pearson's chi-square of four tokens together, of 2500 seeds, against transformers' exact probabilities; the second token and
    the third are drafts that stood, or what took their place."""
    num_seeds, vocab_size, num_tokens = 2500, 5, 4
    folder = tiny_checkpoint(tmp_path, "qwen3_5", num_hidden_layers=3, vocab_size=vocab_size)
    [prompt] = random_prompts([5], vocab_size)
    way = {"max_tokens": num_tokens, "temperature": 1.0}
    requests = [Request(id=str(seed), prompt=prompt, sampling=Sampling(**way, seed=seed)) for seed in range(num_seeds)]
    values = {"mtp": {"num_tokens": 2, "adaptive": False, "max_batch_size": 64}, "max_num_seqs": 64, "max_queue_size": num_seeds}
    with offline.running(settings(folder, "one", 2, **values), pool) as engine:
        answers = tokens_of(engine, requests)
        stats = engine.stats
    assert 0.1 < stats.accepted_tokens / stats.drafted_tokens < 0.9

    texts = [list(text) for text in product(range(vocab_size), repeat=num_tokens)]
    with torch.inference_mode():
        logits = oracle(folder)(torch.tensor([prompt + text for text in texts])).logits
    said = logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
    wanted = num_seeds * said.gather(2, torch.tensor(texts)[..., None]).sum((1, 2)).exp()
    found = torch.zeros(len(texts), dtype=torch.float64)
    for answer in answers:
        found[texts.index(answer)] += 1
    often = wanted >= 5
    wanted, found = (torch.cat((each[often], each[~often].sum()[None])) for each in (wanted, found))
    statistic, freedom = ((found - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    p_value = float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2))
    assert freedom > 100 and 0.01 < p_value < 0.99, (float(statistic), freedom, p_value)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_rank_is_a_pause(checkpoints, expected, stage):
    """While the other stage's rank may wait for what settles its next step."""
    folder, others = checkpoints["qwen3_5"], psutil.Process().children()
    sampling = Sampling(max_tokens=NUM_TOKENS, temperature=0.0)
    requests = [Request(id=str(i), prompt=prompt, sampling=sampling) for i, prompt in enumerate(PROMPTS)]
    with offline.running(settings(folder, "pp2", 3, step_timeout_s=15.0)) as engine:
        ranks = [child for child in psutil.Process().children() if child not in others]
        assert len(ranks) == 2
        answers = tokens_of(engine, requests, 120, kill_at(NUM_TOKENS // 2, ranks[stage]))
        assert engine.stats.epochs == 2
    assert_same_tokens(folder, PROMPTS, answers, expected["qwen3_5"])
