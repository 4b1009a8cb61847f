"""EPLB in a real server: transformers' tokens while experts move with every few steps, the service asked over HTTP, killed, and started
again with what it saved."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.process import ServerProcess
from server.test_life import ask_many
from server.test_parallel import SIZES, answers_of
from tiny import greedy_tokens, random_prompts, tiny_checkpoint
from trireme.engine.eplb_file import read
from trireme_tools.eplb import show, simulate

RANKS = {"tensor_parallel_size": 2, "expert_parallel_size": 2, "max_num_batched_tokens": 64}
RESTLESS = {"num_redundant_experts": 2, "interval": 4, "count_every": 2, "layers_per_step": 1, "min_gain": -1.0}  # every look moves
NUM_TOKENS = 60


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("mixture"), "qwen3_moe", **SIZES)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts((1, 19, 7, 90, 33))


@pytest.fixture(scope="module")
def expected(mixture, prompts) -> list[list[int]]:
    return greedy_tokens(mixture, prompts, NUM_TOKENS)


@pytest.fixture(scope="module")
def two_stages(mixture, tmp_path_factory) -> Iterator[ServerProcess]:
    """The last test here kills a stub of it."""
    server = ServerProcess(tmp_path_factory.mktemp("eplb"), model=str(mixture), pipeline_parallel_size=2, eplb=RESTLESS, **RANKS).start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


def ask(server: ServerProcess, query: str) -> tuple[int, Any]:
    """(HTTP status, the service's answer or the server's error)"""
    status, text = server.post("/v2/models/eplb/generate", {"query": query})
    answer = json.loads(text)
    return status, json.loads(answer["text_output"]) if status == 200 else answer["error"]


def maps_of(server: ServerProcess) -> list[list[list[int]]]:
    """By stage and layer."""
    return [[layer["map"] for layer in stage["layers"]] for stage in ask(server, "map")[1]["stages"]]


def last_event(server: ServerProcess) -> str:
    """What the maps of stage 0 last changed for."""
    return ask(server, "history")[1]["stages"][0]["history"][-1]["reason"]


def test_experts_move_under_way(two_stages, prompts, expected):
    assert answers_of(two_stages, prompts, NUM_TOKENS) == expected
    assert answers_of(two_stages, prompts, NUM_TOKENS) == expected
    _, state = ask(two_stages, "state")
    for stage in state["stages"]:
        assert stage["version"] > 4 and stage["self_test"] == "passed" and stage["num_faults"] == 0 and stage["moved_bytes"] > 0
    assert two_stages.metric("faults_total") == 0


def test_what_the_service_says(two_stages):
    _, loads = ask(two_stages, "loads")
    assert [[layer["layer"] for layer in stage["layers"]] for stage in loads["stages"]] == [["0"], ["2", "3"]]
    assert all(sum(layer["loads"]) > 0 for stage in loads["stages"] for layer in stage["layers"])
    assert ask(two_stages, "start")[1]["mode"] == "stat" and ask(two_stages, "stop")[1]["mode"] is None
    status, error = ask(two_stages, "weather")
    assert status == 400 and "no such query" in error
    two_stages.await_metric("eplb_ready", 1)
    for stage, layer in (("0", "0"), ("1", "3")):
        assert 0.5 <= two_stages.metric("eplb_balancedness", stage=stage, layer=layer) <= 1
        assert two_stages.metric("eplb_expert_load", stage=stage, layer=layer, rank="1") > 0
        assert two_stages.metric("eplb_map_version", stage=stage) > 4
        assert two_stages.metric("eplb_moved_bytes_total", stage=stage) > 0


def test_its_picture_is_drawn(two_stages, tmp_path, capsys):
    show(f"http://127.0.0.1:{two_stages.http}", output=tmp_path / "live.png")
    assert (tmp_path / "live.png").read_bytes().startswith(b"\x89PNG") and "over mean" in capsys.readouterr().out


def test_serving_goes_on_without_the_service(two_stages, prompts, expected):
    threads, answers = ask_many(two_stages, prompts, NUM_TOKENS)
    time.sleep(0.3)
    two_stages.stub("eplb").kill()
    for thread in threads:
        thread.join(120)
    if "boost::interprocess::lock_exception" in two_stages.log:
        pytest.skip("the server aborted by itself as a stub died, which 24.10 does now and then (README, Limits)")
    assert [answer["output_ids"] for _, answer in answers] == expected
    two_stages.await_metric("bls_reloads_total", 1)
    two_stages.await_metric("eplb_ready", 1)
    before = two_stages.metric("eplb_map_version", stage="0")
    deadline = time.monotonic() + 60
    while ask(two_stages, "state")[1]["stages"][0]["version"] <= before:  # the new one offers maps on top of what the stage has
        assert answers_of(two_stages, prompts, NUM_TOKENS) == expected
        assert time.monotonic() < deadline, two_stages.log[-4000:]
    assert two_stages.metric("faults_total") == 0 and two_stages.metric("stage_rank_restarts") == 0


def test_experts_of_every_row_are_recorded(mixture, prompts, expected, tmp_path):
    """What the service writes of a sequence's rows is what its user is told; experts move meanwhile, tokens are the same."""
    eplb = {**RESTLESS, "state": str(tmp_path / "state")}
    with ServerProcess(tmp_path, model=str(mixture), pipeline_parallel_size=2, eplb=eplb, **RANKS) as server:
        assert ask(server, "start per_token 8")[1] == {
            "mode": "per_token",
            "num_pushes": 0,
            "left_out": 0,
            "num_rows": 0,
            "rows_left_out": 0,
        }
        deadline = time.monotonic() + 60
        while not ask(server, "state")[1]["recording"]["num_rows"]:  # stages hear of it with their next push
            assert answers_of(server, prompts[:1], NUM_TOKENS) == expected[:1]
            assert time.monotonic() < deadline, server.log[-4000:]
        told = server.generate(input_ids=prompts[3], max_tokens=NUM_TOKENS, ignore_eos=True, return_routed_experts=True)[1]
        assert answers_of(server, prompts, NUM_TOKENS) == expected
        assert ask(server, "stop")[1]["rows_left_out"] == 0
        file = Path(ask(server, "dump")[1]["file"])
        status, error = ask(server, "dump")
        assert status == 400 and "no loads were recorded" in error
        assert answers_of(server, prompts, NUM_TOKENS) == expected
        assert server.metric("faults_total") == 0
    contents, notes = read(file), json.loads(file.with_suffix(".json").read_text())
    assert notes["stage_0.layers"] == ["0"] and notes["stage_1.layers"] == ["2", "3"]
    wanted = np.array(told["routed_experts"]).reshape(len(prompts[3]) + NUM_TOKENS, 3, 3)[:-1]
    assert _has(contents.arrays, "stage_0", wanted[:, :1]) and _has(contents.arrays, "stage_1", wanted[:, 1:])
    simulate(file, slots=10, ranks=2, output=tmp_path / "simulated.png")


def _has(arrays: dict[str, np.ndarray], stage: str, wanted: np.ndarray) -> bool:
    """Whether the rows of one sequence, [rows, layers, experts of a row], stand there from position 0 on, in their order."""
    rows, experts = arrays[f"{stage}.rows"], arrays[f"{stage}.experts"]
    for slot in np.unique(rows[:, 2]):
        here, at = rows[rows[:, 2] == slot], experts[rows[:, 2] == slot]
        for first in np.flatnonzero(here[:, 3] == 0):
            part = slice(first, first + len(wanted))
            if (here[part, 3] == np.arange(len(here[part]))).all() and np.array_equal(at[part], wanted):
                return True
    return False


def test_maps_outlive_the_server(mixture, prompts, expected, tmp_path):
    state = str(tmp_path / "state")
    for folder in ("first", "again"):
        (tmp_path / folder).mkdir()
    with ServerProcess(tmp_path / "first", model=str(mixture), eplb={**RESTLESS, "state": state}, **RANKS) as server:
        assert answers_of(server, prompts, NUM_TOKENS) == expected
        had = maps_of(server)
    still = {**RESTLESS, "min_gain": 0.99, "state": state}
    with ServerProcess(tmp_path / "again", model=str(mixture), eplb=still, **RANKS) as server:
        deadline = time.monotonic() + 60
        assert maps_of(server) == had  # which no stage has yet
        while last_event(server) != "restore" or maps_of(server) != had:
            assert answers_of(server, prompts, NUM_TOKENS) == expected
            assert time.monotonic() < deadline, server.log[-4000:]
