"""Several GPUs give transformers' tokens: every form of parallel stages over NCCL in float32, with graphs and without, drafts,
expert maps that change, and a rank that is killed in the middle."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from drafted import draft_well
from plans.grid import settings_of, sizes_of
from plans.test_plans import make_prompts
from plans.test_rebalance import Wanderer, serving, states_of
from plans.whole import assert_same_tokens, tokens_of
from tiny import HYBRID_FAMILIES, greedy_tokens, tiny_checkpoint
from trireme.core.request import Emission, Request, Sampling
from trireme.core.settings import Settings, make_settings
from trireme.ranks.pool import RankPool

NUM_GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.gpus, pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")]

NUM_TOKENS = 24
PROMPTS = make_prompts()
PLANS = {
    "qwen3": ["pp2", "tp2", "tp2 sp", "cp2", "pp2 tp2"],
    "qwen3_moe": ["tp2", "tp2 sp", "cp2 ep2", "tp2 ep2", "tp2 ep2 dispatched", "tp4 ep2", "pp2 tp2 ep2"],
    "qwen3_5_moe": ["pp2 mtp3", "tp2", "tp2 ep2 mtp1", "tp2 ep2 dispatched", "tp2 sp mtp3", "cp2 mtp2", "pp2 tp2 mtp3"],
}


class Truth(NamedTuple):
    folder: Path
    greedy: list[list[int]]  # what transformers says after each of PROMPTS


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Its workers multiply float32 as float32, whatever the image's own settings say."""
    with pytest.MonkeyPatch.context() as patch, closing(RankPool()) as pool:
        for name, value in {"NVIDIA_TF32_OVERRIDE": "0", "NCCL_NVLS_ENABLE": "0"}.items():
            patch.setenv(name, value)
        yield pool


@pytest.fixture(scope="module")
def truths(tmp_path_factory) -> dict[str, Truth]:
    root, found = tmp_path_factory.mktemp("checkpoints"), {}
    for family in PLANS:
        folder = tiny_checkpoint(root / family, family, **sizes_of(family, "tp4 ep2"))
        if family in HYBRID_FAMILIES:
            draft_well(folder, sureness=0.9)
        found[family] = Truth(folder, greedy_tokens(folder, PROMPTS, NUM_TOKENS))
    return found


def settings(folder: Path, plan: str, **values) -> Settings:
    base = {"model": str(folder), "device": "cuda", "max_model_len": 256, "max_num_seqs": 8, "num_pages": 200}
    given = {"mtp": {"num_tokens": 0}} | settings_of(plan)
    given["mtp"] |= {"adaptive": False}
    if given.get("sequence_parallel") == "on":
        given["sequence_parallel"] = 2  # it would begin where it pays, which is beyond steps as small as these
    return make_settings(base | {"max_num_batched_tokens": 100, "step_timeout_s": 30.0} | given | values)


def requests(turn: int = 0) -> list[Request]:
    greedy = Sampling(max_tokens=NUM_TOKENS, temperature=0.0)
    return [Request(id=f"{turn}.{i}", prompt=prompt, sampling=greedy) for i, prompt in enumerate(PROMPTS)]


def needs(made: Settings) -> None:
    if made.world > NUM_GPUS:
        pytest.skip(f"needs {made.world} GPUs")


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize(("family", "plan"), [(family, plan) for family, plans in PLANS.items() for plan in plans])
def test_tokens_are_those_of_transformers(pool, request, family, plan, eager):
    made = settings(Path(), plan, enforce_eager=eager)
    needs(made)
    truth = request.getfixturevalue("truths")[family]
    with serving(settings(truth.folder, plan, enforce_eager=eager), pool, None) as (engine, _):
        assert_same_tokens(truth.folder, PROMPTS, tokens_of(engine, requests()), truth.greedy)
        again = requests(1)[-4:]  # with pages to reuse
        assert_same_tokens(truth.folder, PROMPTS[-4:], tokens_of(engine, again), truth.greedy[-4:])
        assert (engine.stats.accepted_tokens > 0) == ("mtp" in plan)
        assert (engine.stats.cp_steps > 0) == ("cp" in plan) and (engine.stats.sp_steps > 0) == ("sp" in plan.split())
        assert engine.stats.epochs == 1


def test_ranks_find_out_where_sequence_parallelism_pays(pool, truths):
    folder, greedy = truths["qwen3"]
    with serving(settings(folder, "tp2 sp", sequence_parallel="on"), pool, None) as (engine, _):
        assert_same_tokens(folder, PROMPTS, tokens_of(engine, requests()), greedy)


@pytest.mark.parametrize("strip_rows", [576, 288])
@pytest.mark.parametrize(("family", "plan"), [("qwen3", "tp2 sp"), ("qwen3_moe", "tp2 ep2 dispatched sp"), ("qwen3_5_moe", "tp2 sp mtp3")])
def test_large_steps_by_mail_and_in_strips_change_no_token(pool, truths, family, plan, strip_rows):
    """Steps of up to 576 rows; mail takes 256 rows and more, and NCCL less."""
    folder, greedy = truths[family]
    with serving(settings(folder, plan, max_num_seqs=16, max_num_batched_tokens=576, strip_rows=strip_rows), pool, None) as (engine, _):
        for turn in range(2):
            assert_same_tokens(folder, PROMPTS, tokens_of(engine, requests(turn)), greedy)


EPLB = {"num_redundant_experts": 4, "count_every": 5, "layers_per_step": 2}


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        ("qwen3_moe", "tp2 ep2"),
        ("qwen3_moe", "tp2 ep2 dispatched"),
        ("qwen3_moe", "cp2 ep2"),
        ("qwen3_moe", "tp4 ep2"),
        ("qwen3_moe", "pp2 tp2 ep2"),
        ("qwen3_5_moe", "tp2 ep2 mtp1"),
    ],
)
def test_maps_that_change_change_no_token(pool, truths, family, plan):
    folder, greedy = truths[family]
    made, service = settings(folder, plan, eplb=EPLB), Wanderer(4, 2)
    needs(made)
    with serving(made, pool, service) as (engine, _):
        for turn in range(3):
            assert_same_tokens(folder, PROMPTS, tokens_of(engine, requests(turn)), greedy)
        assert engine.stats.epochs == 1
    assert min(service.commits[: made.num_stages]) >= 4 and not service.faults


def test_a_rank_that_dies_in_mid_rebalance_changes_no_token(pool, truths):
    """At an offer, three times: at once, and while experts are on their way."""
    folder, greedy = truths["qwen3_moe"]
    service, delays = Wanderer(4, 2), iter([0.0, 0.002, 0.01])
    with serving(settings(folder, "tp2 ep2", eplb=EPLB), pool, service) as (engine, stages):

        def kill() -> None:
            if service.commits[0] >= 1 and (delay := next(delays, None)) is not None:
                victim = states_of(stages)[0].ranks[1].pid
                threading.Timer(delay, os.kill, (victim, signal.SIGKILL)).start()

        service.before_offer = kill
        for turn in range(4):
            assert_same_tokens(folder, PROMPTS, tokens_of(engine, requests(turn)), greedy)
            service.commits = [0, 0]
        assert sum(state.restarts for state in states_of(stages)) >= 1


@pytest.mark.parametrize(("family", "plan"), [("qwen3", "tp2"), ("qwen3_moe", "tp2 ep2"), ("qwen3_5_moe", "pp2 mtp3")])
def test_a_killed_rank_is_a_pause(pool, truths, family, plan):
    """In the middle of all answers; and once more, after the repair."""
    folder, greedy = truths[family]
    made = settings(folder, plan)
    answers: dict[str, list[int]] = {}
    with serving(made, pool, None) as (engine, stages):
        for turn in range(2):
            news: queue.SimpleQueue[Emission] = queue.SimpleQueue()
            for request in requests(turn):
                answers[request.id] = []
                engine.submit(request, news.put)
            left, victim = len(PROMPTS), states_of(stages)[-1].ranks[-1].pid
            while left:
                emission = news.get(timeout=120)
                assert emission.error is None, emission.error
                answers[emission.request_id] += emission.tokens
                left -= emission.finish_reason is not None
                if victim and len(answers[emission.request_id]) >= NUM_TOKENS // 2:
                    os.kill(victim, signal.SIGKILL)
                    victim = 0
            assert engine.stats.epochs == 2 + turn
    for turn in range(2):
        assert_same_tokens(folder, PROMPTS, [answers[request.id] for request in requests(turn)], greedy)
