"""Parallel stages in a real server: pp x tp x ep and tp x cp give transformers' tokens, also past a kill -9 of any rank; plans
that the checkpoint does not allow fail the load with their sentence."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drafted import draft_well
from server.process import ServerProcess
from server.test_life import ask_many
from tiny import greedy_tokens, random_prompts, tiny_checkpoint

SIZES = {"num_attention_heads": 12, "num_key_value_heads": 2, "num_hidden_layers": 4}
PROMPT_LENS, NUM_TOKENS = (1, 19, 7, 90, 33, 160), 100  # the longest are several chunks


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("mixture"), "qwen3_moe", **SIZES)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(PROMPT_LENS)


@pytest.fixture(scope="module")
def expected(mixture, prompts) -> list[list[int]]:
    return greedy_tokens(mixture, prompts, NUM_TOKENS)


@pytest.fixture(scope="module")
def parallel(mixture, tmp_path_factory) -> Iterator[ServerProcess]:
    """Two stages of two ranks each: the experts dealt out over both, rows between layers cut."""
    axes = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 2, "sequence_parallel": "on"}
    limits = {"max_num_batched_tokens": 64, "step_timeout_s": 20.0}  # see comm.py: rarely a kill is noticed by the time limit alone
    with ServerProcess(tmp_path_factory.mktemp("parallel"), model=str(mixture), **limits, **axes) as server:
        yield server


def answers_of(server: ServerProcess, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Of all at once."""
    threads, answers = ask_many(server, prompts, num_tokens)
    for thread in threads:
        thread.join(120)
    return [answer["output_ids"] for _, answer in answers]


def test_two_stages_of_two_ranks(parallel, prompts, expected):
    assert answers_of(parallel, prompts, NUM_TOKENS) == expected
    parallel.await_metric("rank_state", 4, state="ready")
    for stage in "01":
        for rank in "01":
            assert parallel.metric("rank_state", stage=stage, rank=rank, state="ready") == 1
    assert parallel.metric("sp_steps_total") > 0


@pytest.mark.parametrize(("stage", "rank"), [(0, 1), (1, 0)])
def test_a_killed_rank_is_a_pause_and_the_others_keep_their_weights(parallel, prompts, expected, stage, rank):
    ranks = [(stage, rank) for stage in range(2) for rank in range(2)]
    before = {each: parallel.rank(*each).pid for each in ranks}
    loads, restarts = parallel.log.count("] loaded "), parallel.metric("stage_rank_restarts")
    threads, answers = ask_many(parallel, prompts, NUM_TOKENS)
    time.sleep(0.5)
    parallel.rank(stage, rank).kill()
    assert all(thread.is_alive() for thread in threads), "killed under load"
    for thread in threads:
        thread.join(120)
    assert [answer["output_ids"] for _, answer in answers] == expected
    assert {each for each in ranks if parallel.rank(*each).pid != before[each]} == {(stage, rank)}
    assert parallel.log.count("] loaded ") == loads + 1
    parallel.await_metric("stage_rank_restarts", restarts + 1)
    parallel.await_metric("rank_state", 4, state="ready")


@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("llama", {"tensor_parallel_size": 2, "context_parallel_size": 2}),
        ("qwen3_moe", {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 2, "experts": "dispatched"}),
    ],
)
def test_other_plans(tmp_path, prompts, family, axes):
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", family, **SIZES)
    with ServerProcess(tmp_path, model=str(checkpoint), max_num_batched_tokens=64, **axes) as server:
        assert answers_of(server, prompts, 16) == greedy_tokens(checkpoint, prompts, 16)


def test_a_hybrid_model_drafts_and_heals(tmp_path, prompts):
    """Qwen3.5-MoE over two stages, its head drafting, reused prompts, a killed rank: states and drafts are lost, no token is."""
    checkpoint = draft_well(tiny_checkpoint(tmp_path / "checkpoint", "qwen3_5_moe", **SIZES), sureness=0.9)
    expected = greedy_tokens(checkpoint, prompts, 40)
    axes = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 2}
    with ServerProcess(tmp_path, model=str(checkpoint), max_num_batched_tokens=64, step_timeout_s=20.0, **axes) as server:
        assert answers_of(server, prompts, 40) == expected
        assert answers_of(server, prompts, 40) == expected
        assert server.metric("snapshot_hits_total") > 0 and server.metric("mtp_acceptance_length") > 1
        threads, answers = ask_many(server, prompts, 40)
        time.sleep(0.3)
        server.rank(1, 0).kill()
        for thread in threads:
            thread.join(120)
        assert [answer["output_ids"] for _, answer in answers] == expected


@pytest.fixture(scope="module")
def empty(mixture, tmp_path_factory) -> Iterator[ServerProcess]:
    """A server that loads a model when it is told to."""
    flags = ("--model-control-mode=explicit",)
    server = ServerProcess(tmp_path_factory.mktemp("empty"), explicit=False, flags=flags, model=str(mixture)).start()
    try:
        yield server
        server.stop()
    finally:
        server.kill()


def load(server: ServerProcess, model: str) -> tuple[int, str]:
    """(HTTP status, text); waits for a server that has just been started."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return server.post(f"/v2/repository/models/{model}/load", {})
        except OSError:
            assert time.monotonic() < deadline, server.log[-4000:]
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("model", "values", "sentence"),
    [
        ("llm", {"tensor_parallel_size": 8}, "tp=8 does not divide 12 query heads: each rank needs whole heads (fix: use tp=6)"),
        ("stage_0", {"tensor_parallel_size": 3}, "tp=3 does not divide 2 key/value heads"),
        ("llm", {"tensor_parallel_size": 2, "expert_parallel_size": 4}, "ep=4 times moe_dp=1 does not divide the 2 ranks of a stage"),
        ("stage_0", {"context_parallel_size": 4, "moe_data_parallel_size": 2}, "moe_dp=2 with cp=4"),
        ("llm", {"tensor_parallel_size": 2, "devices": [[0]]}, "devices names 1 for the 2 ranks of stage 0"),
        ("stage_0", {"tensor_parallel_size": 2, "devices": [[998, 999]]}, "devices names GPU 999, and this host has"),
        ("llm", {"tensor_paralel_size": 2}, "unknown setting 'tensor_paralel_size'"),
    ],
)
def test_a_bad_plan_fails_the_load(empty, mixture, model, values, sentence):
    (empty.repository / "llm" / "1" / "model.json").write_text(json.dumps({"model": str(mixture), **values}))
    status, answer = load(empty, model)
    assert status == 400 and sentence in json.loads(answer)["error"]
