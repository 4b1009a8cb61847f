"""Hybrid models through the whole engine: chunks, mixed steps, preemption, prefixes with their states, stages that lack a kind of
layer, a rank that dies. Tokens are transformers'. Plans inside a stage are in test_grid."""

from __future__ import annotations

import random
from pathlib import Path

import psutil
import pytest

from plans.whole import assert_same_tokens, kill_at, tokens_of
from tiny import greedy_tokens, tiny_checkpoint
from trireme.core.request import Request, Sampling
from trireme.core.settings import Settings, make_settings
from trireme_tools import offline

pytestmark = pytest.mark.ranks

NUM_TOKENS, VOCAB = 20, 251
GREEDY = Sampling(max_tokens=NUM_TOKENS, temperature=0.0)

# Layers 0, 1 and 3 of five keep states, 2 and 4 pages.
PLANS = {
    "one": {},
    "one, chunks of 16": {"async_depth": 0, "max_num_batched_tokens": 16},
    "one, depth 2, few pages": {"async_depth": 2, "num_pages": 20, "max_num_batched_tokens": 48},
    "one, few snapshots": {"state_cache_memory_bytes": 16_000},
    "pp2": {"pipeline_parallel_size": 2, "async_depth": 2, "max_num_batched_tokens": 64},
    "pp2, a stage without attention, few pages": {"pipeline_parallel_size": 2, "layer_cut": [2, 3], "num_pages": 20},
    "pp3, a stage without states, tensor link": {"pipeline_parallel_size": 3, "layer_cut": [2, 1, 2], "link": "tensor"},
}
FEW = ("one", "pp2, a stage without attention, few pages")
DEALT = [*(("qwen3_5", plan) for plan in PLANS), *((family, plan) for family in ("qwen3_5_moe", "qwen3_next") for plan in FEW)]


def make_prompts() -> list[list[int]]:
    """12 prompts of 1 to 140 tokens; the last four begin with the same 53."""
    chance = random.Random(0)
    shared, *fresh = [[chance.randrange(3, VOCAB) for _ in range(length)] for length in (53, 1, 2, 15, 16, 17, 32, 90, 140)]
    return fresh + [shared + tail for tail in ([], fresh[2], fresh[4], [*fresh[5], 7])]


PROMPTS = make_prompts()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_checkpoint(root / family, family) for family in ("qwen3_5", "qwen3_5_moe", "qwen3_next")}


@pytest.fixture(scope="module")
def expected(checkpoints) -> dict[str, list[list[int]]]:
    return {family: greedy_tokens(folder, PROMPTS, NUM_TOKENS) for family, folder in checkpoints.items()}


def settings(folder: Path, **values) -> Settings:
    base = {"model": str(folder), "max_model_len": 256, "max_num_seqs": 8, "num_pages": 200, "threads_per_rank": 1}
    return make_settings(base | {"mtp": {"num_tokens": 0}} | values)


def requests(prompts: list[list[int]], name: str = "") -> list[Request]:
    return [Request(id=f"{name}{i}", prompt=prompt, sampling=GREEDY) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize(("family", "plan"), DEALT)
def test_a_plan_changes_nothing(pool, checkpoints, expected, family, plan):
    folder, wanted = checkpoints[family], expected[family]
    with offline.running(settings(folder, **PLANS[plan]), pool) as engine:
        assert_same_tokens(folder, PROMPTS, tokens_of(engine, requests(PROMPTS)), wanted)
        before = engine.stats.cached_tokens
        again = requests(PROMPTS[-4:], "again ")
        assert_same_tokens(folder, PROMPTS[-4:], tokens_of(engine, again), wanted[-4:])
        if "few pages" in plan:
            assert engine.stats.preemptions > 0, "the pool is meant to be too small"
        else:
            assert engine.stats.cached_tokens > before
            assert engine.stats.snapshot_hits > 0


def test_a_sequence_goes_on_after_a_killed_rank(checkpoints, expected):
    """Its states are gone; the next epoch makes them again from its tokens."""
    folder, others = checkpoints["qwen3_5"], psutil.Process().children()
    with offline.running(settings(folder, pipeline_parallel_size=2, step_timeout_s=15.0)) as engine:
        victims = [child for child in psutil.Process().children() if child not in others]
        assert len(victims) == 2
        answers = tokens_of(engine, requests(PROMPTS), 120, kill_at(NUM_TOKENS // 2, victims[-1]))
        assert engine.stats.epochs == 2
    assert_same_tokens(folder, PROMPTS, answers, expected["qwen3_5"])
