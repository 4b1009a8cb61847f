"""Maps of experts that change while tokens are computed change no token: any legal maps, whole stages at once or a layer at a time,
also where a rank dies in the middle. Which maps are good is no matter here."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from drafted import draft_well
from plans.grid import settings_of, sizes_of
from plans.whole import assert_same_tokens, tokens_of
from tiny import greedy_tokens, tiny_checkpoint
from trireme.core.control import Offer, Parcel, Push, StageState, Status, open_answer, pack_ask
from trireme.core.request import Request, Sampling
from trireme.core.settings import Settings, make_settings
from trireme.core.step import array
from trireme.engine.engine import Engine
from trireme.ranks.local import LocalStages

pytestmark = pytest.mark.ranks

NUM_TOKENS, VOCAB, EXPERTS, TOP_K = 40, 251, 8, 3
LENGTHS = (1, 17, 5, 40, 33, 16)


def more(*case: object):
    """Not in every run: `make test-plans` has it."""
    return pytest.param(*case, marks=pytest.mark.grid)


class Wanderer:
    """A service that offers random maps as soon as a stage has the last ones."""

    def __init__(self, num_redundant: int, layers_at_once: int):
        self.pushes: list[list[Push]] = [[], []]  # by stage
        self.commits = [0, 0]
        self.faults: list[str] = []
        self.before_offer = lambda: None
        self._num_redundant, self._layers_at_once = num_redundant, layers_at_once
        self._offered = [0, 0]
        self._rng, self._lock = np.random.default_rng(0), threading.Lock()

    def __call__(self, push: Push) -> Offer:
        with self._lock:
            stage = push.stage
            self.pushes[stage].append(push)
            if push.fault:
                self.faults.append(push.fault)
                self._offered[stage] = 0
            if push.version == self._offered[stage] > 0:
                self.commits[stage] += 1
                self._offered[stage] = 0
            if self._offered[stage]:
                return Offer()
            self._offered[stage] = push.version + 1
            self.before_offer()
            layers = self._rng.permutation(len(array(push.loads)) // EXPERTS)[: self._layers_at_once].tolist()
            return Offer(push.version + 1, {layer: self._map().tobytes() for layer in layers})

    def _map(self) -> np.ndarray:
        spare = self._rng.integers(EXPERTS, size=self._num_redundant)
        return self._rng.permutation(np.concatenate([np.arange(EXPERTS), spare])).astype(np.int32)


@contextlib.contextmanager
def serving(settings: Settings, pool, service: Wanderer | None) -> Iterator[tuple[Engine, LocalStages]]:
    run_dir = Path(tempfile.mkdtemp(prefix="trireme-test-", dir="/tmp"))
    stages = LocalStages(settings, run_dir, pool, service=service)
    assert settings.max_model_len is not None
    engine = Engine(settings, max_model_len=settings.max_model_len, stages=stages, num_drafts=settings.mtp.num_tokens or 0)
    stages.start()
    engine.start()
    try:
        engine.wait_ready(120)
        yield engine, stages
    finally:
        engine.stop()
        stages.stop()
        assert not run_dir.exists()


def states_of(stages: LocalStages) -> list[StageState]:
    found: list[StageState] = []
    for stage in range(stages.num_stages):
        box: queue.Queue = queue.Queue()
        stages.post(stage, Parcel(pack_ask(Status())), 20.0, box.put)
        state = open_answer(box.get(timeout=30).packed)
        assert isinstance(state, StageState)
        found.append(state)
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe", **sizes_of("qwen3_moe", "tp4 ep4"))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Path:
    """With a head that drafts."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("hybrid"), "qwen3_5_moe", **sizes_of("qwen3_5_moe", "tp2 ep2"))
    return draft_well(folder, sureness=0.9)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(checkpoint, prompts) -> list[list[int]]:
    return greedy_tokens(checkpoint, prompts, NUM_TOKENS)


def settings(checkpoint: Path, plan: str, num_redundant: int, layers_at_once: int, **values) -> Settings:
    eplb = {"num_redundant_experts": num_redundant, "count_every": 5, "layers_per_step": layers_at_once}
    base = {"model": str(checkpoint), "max_model_len": 128, "max_num_seqs": 4, "num_pages": 40, "threads_per_rank": 1, "eplb": eplb}
    return make_settings(base | {"max_num_batched_tokens": 32} | settings_of(plan) | values)


def requests(prompts: list[list[int]], turn: int = 0) -> list[Request]:
    greedy = Sampling(max_tokens=NUM_TOKENS, temperature=0.0)
    return [Request(id=f"{turn}.{i}", prompt=prompt, sampling=greedy) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    ("plan", "num_redundant", "layers_at_once"),
    [
        ("tp2 ep2 dispatched", 4, 1),
        ("tp4 ep4", 8, 4),
        ("pp2 tp2 ep2", 4, 1),
        ("tp2 cp2 moe_dp2 ep2", 4, 4),
        more("tp2 ep2", 4, 4),
        more("tp2 ep2", 0, 1),
        more("tp4 ep4 dispatched", 4, 1),
        more("tp4 ep2", 2, 4),
        more("pp2 tp2 ep2 sp dispatched", 4, 4),
        more("tp2 cp2 moe_dp2 ep2 dispatched", 2, 1),
    ],
)
def test_maps_that_change_change_no_token(pool, checkpoint, prompts, expected, plan, num_redundant, layers_at_once):
    made = settings(checkpoint, plan, num_redundant, layers_at_once)
    service = Wanderer(num_redundant, layers_at_once)
    with serving(made, pool, service) as (engine, _):
        for turn in range(2):
            assert_same_tokens(checkpoint, prompts, tokens_of(engine, requests(prompts, turn)), expected)
    for stage in range(made.num_stages):
        assert service.commits[stage] >= 4, service.commits
        for push in service.pushes[stage]:
            loads = array(push.loads).reshape(-1, EXPERTS).sum(1)
            assert (loads % TOP_K == 0).all() and (loads[:-1] == loads[0]).all(), "each row once, in each layer"
            assert loads[-1] <= loads[0] if stage == made.num_stages - 1 else loads[-1] == loads[0], "in the last of all, rows that go on"
        assert sum(push.moved_bytes for push in service.pushes[stage]) > 0
    assert not service.faults


@pytest.mark.parametrize(
    ("plan", "num_redundant", "layers_at_once"), [("tp2 ep2 mtp3", 4, 5), more("pp2 tp2 ep2 sp dispatched mtp2", 4, 1)]
)
def test_drafts_stand_as_before(pool, hybrid, prompts, plan, num_redundant, layers_at_once):
    """The head's experts have maps and loads of their own, which the model's never touch."""
    made = settings(hybrid, plan, num_redundant, layers_at_once, num_pages=60)
    expected, lengths = greedy_tokens(hybrid, prompts, NUM_TOKENS), []
    services = [None, Wanderer(num_redundant, layers_at_once)]
    for service in services:
        with serving(made, pool, service) as (engine, _):
            for turn in range(2):
                assert_same_tokens(hybrid, prompts, tokens_of(engine, requests(prompts, turn)), expected)
            lengths.append(1 + engine.stats.accepted_tokens / engine.stats.verifications)
    assert lengths[0] > 1.2 and lengths[1] == pytest.approx(lengths[0], abs=0.05)
    assert services[1].commits[made.num_stages - 1] >= 4
    for push in services[1].pushes[made.num_stages - 1]:
        loads = array(push.loads).reshape(-1, EXPERTS).sum(1)
        assert (loads[:-1] == loads[0]).all() and loads[-1] % TOP_K == 0


@pytest.mark.parametrize("plan", [more("tp2 ep2"), "pp2 tp2 ep2 dispatched"])
def test_a_rank_that_dies_in_mid_rebalance_changes_no_token(pool, checkpoint, prompts, expected, plan):
    """At an offer: whatever of it some ranks have by then, those that live and the one that starts again agree."""
    made = settings(checkpoint, plan, 4, 4, step_timeout_s=20.0)
    service = Wanderer(4, 4)
    with serving(made, pool, service) as (engine, stages):
        delays = iter([0.0, 0.005, 0.02])

        def kill() -> None:
            if max(service.commits) < 1 or (delay := next(delays, None)) is None:
                return
            victim = states_of(stages)[0].ranks[1].pid
            threading.Timer(delay, lambda: os.kill(victim, signal.SIGKILL)).start()

        service.before_offer = kill
        for turn in range(3):
            assert_same_tokens(checkpoint, prompts, tokens_of(engine, requests(prompts, turn)), expected)
            service.commits = [0, 0]
        assert sum(state.restarts for state in states_of(stages)) >= 1
