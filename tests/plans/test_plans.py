"""Any plan, same tokens: the engine with real ranks gives transformers' greedy tokens under every stage count, link, depth,
chunk size, page pool and prefix setting. Offline, so no server is needed; tests/server does the same through tritonserver."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from plans.whole import emissions_of, tokens_of
from tiny import greedy_tokens, prompt_logits, tiny_checkpoint
from trireme.core.request import Request, Sampling
from trireme.core.settings import Settings, make_settings
from trireme_tools import offline

pytestmark = pytest.mark.ranks

NUM_TOKENS, VOCAB = 24, 251

# Every value of every setting appears, and the pairs that could interact: few pages preempt, small chunks cut prompts.
PLANS = {
    "one": {},
    "one, depth 0, chunks of 16": {"async_depth": 0, "max_num_batched_tokens": 16},
    "one, depth 2, few pages": {"async_depth": 2, "num_pages": 24, "max_num_batched_tokens": 64},
    "pp2": {"pipeline_parallel_size": 2},
    "pp2, depth 0, no reuse": {"pipeline_parallel_size": 2, "async_depth": 0, "enable_prefix_caching": False},
    "pp2, tensor link": {"pipeline_parallel_size": 2, "link": "tensor", "max_num_batched_tokens": 32},
    "pp2, depth 2, few pages": {"pipeline_parallel_size": 2, "async_depth": 2, "num_pages": 24, "max_num_batched_tokens": 128},
    "pp3": {"pipeline_parallel_size": 3, "layer_cut": [2, 1, 1], "max_num_batched_tokens": 16},
    "pp3, tensor link, few pages": {"pipeline_parallel_size": 3, "link": "tensor", "async_depth": 0, "num_pages": 24},
    "pp3, depth 2": {"pipeline_parallel_size": 3, "async_depth": 2, "max_micro_batch_size": 2, "max_num_batched_tokens": 512},
}
# llama meets every plan; the others meet one stage, two and three, few pages, small chunks and both links among them.
DEALT = [
    *(("llama", plan) for plan in PLANS),
    *(("qwen2", plan) for plan in ("one, depth 2, few pages", "pp2, tensor link", "pp3")),
    *(("qwen3", plan) for plan in ("one, depth 0, chunks of 16", "pp2, depth 2, few pages", "pp3, tensor link, few pages")),
]


def make_prompts() -> list[list[int]]:
    """12 prompts of 1 to 150 tokens; some begin alike, so that pages can be reused."""
    rng = random.Random(0)
    shared = [rng.randrange(3, VOCAB) for _ in range(50)]
    fresh = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in (1, 2, 15, 16, 17, 33, 90, 150)]
    return fresh + [shared + tail for tail in ([], fresh[2], fresh[4], [*fresh[4], 7])]


PROMPTS = make_prompts()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_checkpoint(root / family, family, num_hidden_layers=4) for family in ("llama", "qwen2", "qwen3")}


@pytest.fixture(scope="module")
def expected(checkpoints) -> dict[str, list[list[int]]]:
    return {family: greedy_tokens(folder, PROMPTS, NUM_TOKENS) for family, folder in checkpoints.items()}


def settings(folder: Path, plan: str) -> Settings:
    base = {"model": str(folder), "max_model_len": 256, "max_num_seqs": 8, "num_pages": 200, "threads_per_rank": 1}
    return make_settings(base | PLANS[plan])


@pytest.mark.parametrize(("family", "plan"), DEALT)
def test_a_plan_changes_nothing(pool, checkpoints, expected, family, plan):
    greedy = Sampling(max_tokens=NUM_TOKENS, temperature=0.0)
    requests = [Request(id=str(i), prompt=prompt, sampling=greedy) for i, prompt in enumerate(PROMPTS)]
    with offline.running(settings(checkpoints[family], plan), pool) as engine:
        assert tokens_of(engine, requests) == expected[family]
        again = [Request(id=f"{request.id} again", prompt=request.prompt, sampling=greedy) for request in requests[-4:]]
        assert tokens_of(engine, again) == expected[family][-4:]  # now with pages to reuse, where the plan allows it
        if "few pages" in plan:
            assert engine.stats.preemptions > 0, "the pool is meant to be too small"


def test_seeds_and_prompt_logprobs_are_the_same_under_any_plan(pool, checkpoints):
    """A seed gives the same tokens whatever the plan and the batch; prompt logprobs are transformers', in any chunks."""
    asked = [prompt for prompt in PROMPTS if len(prompt) > 1]
    drawn = []
    for plan in ("pp2, depth 2, few pages", "one, depth 0, chunks of 16"):
        requests = [
            Request(id=str(i), prompt=prompt, sampling=Sampling(max_tokens=8, temperature=0.9, top_p=0.95, seed=i, prompt_logprobs=2))
            for i, prompt in enumerate(asked)
        ]
        with offline.running(settings(checkpoints["llama"], plan), pool) as engine:
            answers = emissions_of(engine, requests)
        drawn.append([[token for emission in answer for token in emission.tokens] for answer in answers])
        for prompt, answer in zip(asked, answers, strict=True):
            (told,) = [emission.prompt_logprobs for emission in answer if emission.prompt_logprobs is not None]
            wanted = prompt_logits(checkpoints["llama"], prompt).log_softmax(-1)
            assert told[0] is None
            assert [entry.token for entry in told[1:]] == prompt[1:]
            assert [entry.value for entry in told[1:]] == pytest.approx([wanted[i, t].item() for i, t in enumerate(prompt[1:])], abs=1e-4)
            assert told[1].top_values == pytest.approx(wanted[0].topk(2).values.tolist(), abs=1e-4)
    assert drawn[0] == drawn[1]
