"""Engine and Chain over stages in threads: reordered answers, faults, timeouts, dead stages, repairs; tokens stay the toy's."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
import threading
import time

import pytest

from engine.driver import make_request
from engine.fake_stages import FakeStage, FakeStages
from engine.toy import expected
from trireme.core.control import Fault, Join, open_message
from trireme.core.refusal import Refusal
from trireme.core.request import Request, Sampling
from trireme.core.settings import make_settings
from trireme.core.step import Step
from trireme.engine.engine import Engine

MAX_MODEL_LEN = 200


class Answers:
    """Collects emissions of many requests and waits for their ends."""

    def __init__(self, engine: Engine, has_states: bool = False):
        self.engine, self.has_states = engine, has_states
        self.heard: dict[str, list] = {}
        self.ends: dict[str, threading.Semaphore] = {}
        self.requests: dict[str, Request] = {}

    def submit(self, request: Request) -> None:
        heard = self.heard[request.id] = []
        end = self.ends[request.id] = threading.Semaphore(0)
        self.requests[request.id] = request

        def listen(emission) -> None:
            heard.append(emission)
            if emission.finish_reason is not None:
                end.release()

        self.engine.submit(request, listen)

    def wait(self, name: str, timeout=20.0):
        for _ in range(self.requests[name].sampling.n):
            assert self.ends[name].acquire(timeout=timeout), f"{name} has no end: {self.engine.state()}"
        return self.heard[name][-1]

    def check(self, timeout=20.0) -> None:
        """Every request ended with its exact tokens."""
        for name, request in self.requests.items():
            self.wait(name, timeout)
            sampling = request.sampling
            for index in range(sampling.n):
                heard = [e for e in self.heard[name] if e.index == index]
                want = expected(
                    request.prompt,
                    seed=sampling.seed + index,
                    limit=min(len(request.prompt) + sampling.max_tokens, MAX_MODEL_LEN),
                    stops=sampling.stop_token_ids,
                    min_tokens=sampling.min_tokens,
                    bad_words=sampling.bad_words,
                    has_states=self.has_states,
                )
                assert ([t for e in heard for t in e.tokens], heard[-1].finish_reason) == want


@pytest.fixture
def start():
    engines = []

    def start(stages: FakeStages, ready=True, **given) -> tuple[Engine, Answers]:
        values = {"model": "toy", "pipeline_parallel_size": stages.num_stages, "link": stages.link, "max_num_batched_tokens": 64}
        settings = make_settings({**values, "step_timeout_s": 5.0, **given})
        engine = Engine(settings, max_model_len=MAX_MODEL_LEN, stages=stages, num_drafts=stages.toy.num_drafts)
        engines.append(engine)
        engine.start()
        if ready:
            engine.wait_ready(5)
        return engine, Answers(engine, stages.toy.num_snapshots is not None)

    yield start
    for engine in engines:
        engine.stop()


def simple(name: str, num_prompt=20, max_tokens=10, **given) -> Request:
    return Request(id=name, prompt=[i % 50 for i in range(num_prompt)], sampling=Sampling(max_tokens=max_tokens, **given))


@pytest.mark.parametrize("link", ["collective", "tensor"])
@pytest.mark.parametrize("num_stages, async_depth", [(1, 0), (1, 1), (2, 1), (3, 2)])
def test_same_tokens(start, link, num_stages, async_depth):
    engine, answers = start(FakeStages(num_stages, link=link), async_depth=async_depth)
    rng = random.Random(num_stages)
    for i in range(12):
        answers.submit(make_request(rng, f"r{i}"))
    answers.check()
    wait_until(lambda: engine.stats.pages_used == 0 and engine.stats.running == 0)
    assert engine.stats.faults == 0 and engine.state()[0] == "ready"


@pytest.mark.parametrize(("measured", "rows"), [((), 2), ((20, 40), 40), ((40, 20), 40), ((None, 24), 24)])
def test_sequence_parallelism_begins_where_it_pays_in_every_stage(start, measured, rows):
    failing, heard = [3], []

    def fault(stage: int, step: Step) -> str | None:
        heard.append((step.num_rows, step.sp))
        return failing.pop() and "fell over" if failing and failing[0] == step.number else None

    stages = FakeStages(2, sp_from=measured, fault=fault)
    engine, answers = start(stages, tensor_parallel_size=2, sequence_parallel="on")
    for i in range(6):
        answers.submit(simple(f"r{i}", num_prompt=10 * i + 1))
    answers.check()
    assert engine.stats.epochs == 2
    assert {sp for _, sp in heard} == {True, False} and all(sp == (num_rows >= rows) for num_rows, sp in heard)


def test_faults_are_repaired(start):
    rng = random.Random(1)
    stages = FakeStages(2, fault=lambda stage, step: "fell over" if rng.random() < 0.01 else None)
    engine, answers = start(stages, start_timeout_s=60)
    for i in range(10):
        while True:
            try:
                answers.submit(make_request(random.Random(i), f"r{i}"))
                break
            except Refusal as refusal:  # in a repair
                assert refusal.kind == "unavailable"
                time.sleep(0.05)
    answers.check(60)
    assert engine.stats.faults > 0 and engine.stats.epochs == engine.stats.faults + 1


@pytest.mark.parametrize("link", ["collective", "tensor"])
@pytest.mark.parametrize("num_stages, num_snapshots, num_drafts", [(1, None, 3), (1, 3, 0), (2, 3, 3), (3, 0, 1)])
def test_same_tokens_with_states_and_drafts(start, link, num_stages, num_snapshots, num_drafts):
    stages = FakeStages(num_stages, link=link, num_snapshots=num_snapshots, num_drafts=num_drafts)
    engine, answers = start(stages)
    rng = random.Random(num_stages)
    for i in range(12):
        answers.submit(make_request(rng, f"r{i}"))
    answers.check()
    stats = engine.stats
    assert stats.faults == 0 and (stats.verifications > 0) == (num_drafts > 0)
    assert (stats.snapshot_hits > 0) == bool(num_snapshots) and stats.snapshots_total == (num_snapshots or 0)


def test_faults_with_states_and_drafts_are_repaired(start):
    failing = [30, 20, 9]

    def fault(stage, step) -> str | None:
        return f"fell over at {failing.pop()}" if failing and step.number == failing[-1] else None

    stages = FakeStages(2, num_snapshots=4, num_drafts=3, fault=fault)
    engine, answers = start(stages, start_timeout_s=60)
    for i in range(8):
        answers.submit(make_request(random.Random(i), f"r{i}", longest=60))
    answers.check(60)
    assert engine.stats.faults == 3


@pytest.mark.parametrize("link", ["collective", "tensor"])
def test_expert_maps_are_stamped_when_they_are_ready(start, link):
    """Stages refuse a version that they have not prepared, or an older one; answers overtake each other."""
    stages = FakeStages(2, link=link, rebalances=0.3)
    engine, answers = start(stages, eplb={"count_every": 4})
    rng = random.Random(4)
    for i in range(12):
        answers.submit(make_request(rng, f"r{i}"))
    answers.check()
    assert engine.stats.faults == 0
    assert stages.num_commits > 4 and stages.stages[0].map_version > 2
    assert set(stages.reports) == {4}


def test_an_epoch_begins_with_the_maps_that_stages_have(start):
    """Those that were ready and not stamped are gone, and a stage that was loaded again has those of the checkpoint."""

    def fault(stage: int, step) -> str | None:
        if (step.epoch, step.number) == (2, 12):
            stages.gone.add(1)
        return "fell over" if step.epoch < 2 and step.number == 12 and stage == 0 else None

    stages = FakeStages(2, rebalances=1.0, fault=fault)
    engine, answers = start(stages, start_timeout_s=60, eplb={})
    rng = random.Random(5)
    for i in range(12):
        answers.submit(make_request(rng, f"r{i}"))
    answers.check(60)
    assert stages.healed[1] and engine.stats.faults == 3
    assert stages.num_commits > 10


def test_stages_that_do_not_count_are_not_asked_to(start):
    stages = FakeStages(1)
    _, answers = start(stages)
    answers.submit(simple("a", max_tokens=30))
    answers.check()
    assert not stages.reports and not stages.num_commits


def test_an_answer_without_its_drafts_is_a_fault(start):
    stages = FakeStages(1, num_drafts=3)
    cut = iter([b""])
    stages.redraft = lambda drafts: next(cut, drafts) if drafts else drafts
    engine, answers = start(stages)
    answers.submit(simple("a"))
    answers.check()
    assert engine.stats.faults == 1


def test_a_stranded_call_is_a_fault(start):
    strikes = iter(["mute"])
    engine, answers = start(FakeStages(2, fault=lambda stage, step: next(strikes, None) if stage else None), step_timeout_s=0.5)
    answers.submit(simple("a"))
    answers.check()
    assert engine.stats.faults == 1


def test_a_stage_that_does_not_join_is_not_waited_for_by_the_others(start):
    """As when a rank has died and its leader does not know yet: the other stages wait for it in the join."""
    stages = FakeStages(2)
    joins = []

    def take(stage, parcel, answer, take_of=FakeStage.take):
        message = open_message(parcel.packed)
        if isinstance(message, Join):
            joins.append((stage.stage, message.epoch))
            if message.epoch == 0:
                if stage.stage == 1:
                    answer(Fault("rank", "cannot be reached", 1, 0))
                return
        take_of(stage, parcel, answer)

    for stage in stages.stages:
        stage.take = functools.partial(take, stage)
    began = time.monotonic()
    start(stages, step_timeout_s=60)
    assert time.monotonic() - began < 5 and sorted(joins) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_dead_stage_is_found_before_the_deadline_and_healed(start):
    stages = FakeStages(2, delay_s=0.02)
    _, answers = start(stages, step_timeout_s=60)
    answers.submit(simple("a", max_tokens=100))
    time.sleep(0.3)
    stages.fault = lambda stage, step: "mute" if stage == 1 else None  # strands what is in flight
    stages.gone.add(1)
    time.sleep(0.2)
    stages.fault = lambda stage, step: None
    began = time.monotonic()
    answers.check()
    assert time.monotonic() - began < 10 and stages.healed == {1: 1}


def test_new_requests_are_refused_by_the_name_of_what_is_missing(start):
    stages = FakeStages(2)
    stages.stages[1].state, stages.stages[1].detail = "loading", "loading weights"
    engine, answers = start(stages, ready=False)
    wait_until(lambda: "loading" in engine.state()[0])
    with pytest.raises(Refusal, match="stage_1: loading weights") as refused:
        answers.submit(simple("a"))
    assert refused.value.kind == "unavailable"
    stages.stages[1].state = "ready"
    engine.wait_ready(5)
    answers.submit(simple("b"))
    answers.requests.pop("a")
    answers.check()


def test_a_failed_stage_ends_what_runs_with_its_sentence(start):
    stages = FakeStages(2, delay_s=0.02)
    engine, answers = start(stages)
    answers.submit(simple("a", max_tokens=150))
    time.sleep(0.2)
    stages.stages[1].state, stages.stages[1].detail = "failed", "weights are missing: no /m/x.safetensors"
    stages.fault = lambda stage, step: "rank died"
    end = answers.wait("a")
    assert end.finish_reason == "error" and "weights are missing" in str(end.error)
    with pytest.raises(Refusal, match="weights are missing"):
        engine.wait_ready(5)
    with pytest.raises(Refusal, match="weights are missing"):
        answers.submit(simple("b"))


def test_a_poisonous_request_is_given_up_and_others_go_on(start):
    poison, both = 49, threading.Event()
    stages = FakeStages(1, fault=lambda stage, step: "illegal access" if poison in step_tokens(step) and both.wait(5) else None)
    _, answers = start(stages, max_num_seqs=1, async_depth=0)  # else the fault may be told by the step after
    answers.submit(Request(id="poison", prompt=[poison] * 5, sampling=Sampling(max_tokens=4)))
    answers.submit(Request(id="good", prompt=[1] * 5, sampling=Sampling(max_tokens=1)))
    both.set()
    assert "illegal access" in str(answers.wait("poison").error)
    answers.requests.pop("poison")
    answers.check()


def test_no_repair_in_time_ends_what_runs(start):
    stages = FakeStages(2)
    stages.heal = lambda stage, error: None
    _, answers = start(stages, start_timeout_s=0.5)
    stages.delay_s = 0.05
    answers.submit(simple("a", max_tokens=150))
    stages.gone.update({0, 1})
    end = answers.wait("a")
    assert end.finish_reason == "error" and "not answering" in str(end.error)


def test_deadlines_may_be_as_far_as_users_please(start):
    """Farther than an operating system can wait."""
    stages = FakeStages(1, delay_s=0.02)
    engine, answers = start(stages, start_timeout_s=1e12)
    whole = simple("a", max_tokens=100)
    answers.submit(Request(id="a", prompt=whole.prompt, sampling=whole.sampling, deadline=float("inf")))
    stages.stages[0].state, stages.stages[0].detail = "loading", "is loading"
    stages.fault = lambda stage, step: "rank died"
    wait_until(lambda: "is loading" in engine.state()[0])  # nothing is due now but the end of patience
    stages.fault = lambda stage, step: None
    stages.stages[0].state = "ready"
    answers.check()


def test_texts_do_not_travel_to_the_stages(start):
    """Nor could every string: half of a surrogate pair has no UTF-8."""
    seen = []
    stages = FakeStages(1, fault=lambda stage, step: seen.extend(opened.sampling for opened in step.opens))
    _, answers = start(stages)
    answers.submit(simple("a", stop=("\ud800", "end")))
    answers.check()
    assert [sampling.stop for sampling in seen] == [()]


def test_too_few_pages_for_the_model(start):
    engine, answers = start(FakeStages(1, num_pages=3), ready=False)
    with pytest.raises(Refusal, match="cannot hold one sequence"):
        engine.wait_ready(5)
    with pytest.raises(Refusal, match="cannot hold one sequence"):
        answers.submit(simple("a"))


def test_cancel_deadline_and_stop(start):
    stages = FakeStages(1, delay_s=0.02)
    engine, answers = start(stages, max_num_seqs=2)
    answers.submit(simple("cancelled", max_tokens=150))
    answers.submit(simple("stopped", max_tokens=150))
    late = simple("late", max_tokens=150)
    answers.submit(Request(id="late", prompt=late.prompt, sampling=late.sampling, deadline=time.monotonic() + 0.2))
    time.sleep(0.1)
    engine.cancel("cancelled")
    engine.cancel("stopped", "stop")
    engine.cancel("nobody")
    assert answers.wait("cancelled").error.kind == "cancelled"
    assert (answers.wait("stopped").finish_reason, answers.heard["stopped"][-1].error) == ("stop", None)
    assert answers.wait("late").finish_reason == "deadline"
    wait_until(lambda: engine.stats.pages_used == 0)
    assert engine.stats.finished == {"cancelled": 1, "stop": 1, "deadline": 1}


def test_queue_is_bounded(start):
    _, answers = start(FakeStages(1, delay_s=0.05), max_num_seqs=1, max_queue_size=2)
    refused = 0
    for i in range(6):
        try:
            answers.submit(simple(f"r{i}"))
        except Refusal as refusal:
            assert refusal.kind == "unavailable" and "queue is full" in str(refusal)
            answers.requests.pop(f"r{i}")
            refused += 1
    assert refused >= 3
    answers.check()


def test_stop_ends_everything(start):
    engine, answers = start(FakeStages(2, delay_s=0.05))
    answers.submit(simple("a", max_tokens=150))
    engine.stop()
    assert answers.wait("a").finish_reason == "error"
    with pytest.raises(Refusal, match="stopped"):
        answers.submit(simple("b"))
    assert not engine._thread.is_alive()


def test_a_listener_that_fails_loses_its_request_only(start):
    engine, answers = start(FakeStages(1))
    engine.submit(simple("bad", max_tokens=100), lambda emission: 1 / 0)
    answers.submit(simple("good"))
    answers.check()
    wait_until(lambda: engine.stats.running == 0)
    assert engine.stats.finished["cancelled"] == 1


def test_trace_and_stats(start, tmp_path):
    engine, answers = start(FakeStages(2), step_trace=str(tmp_path / "trace.jsonl"))
    answers.submit(simple("a", num_prompt=20, max_tokens=10))
    answers.check()
    engine.stop()
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * engine.stats.steps
    assert {"number", "stage", "began", "busy", "receiving", "waiting", "rows", "samples"} <= set(lines[0])
    assert sum(line["rows"] for line in lines if line["stage"] == 1) == 29 and sum(line["samples"] for line in lines) == 20
    stats = engine.stats
    assert (stats.prompt_tokens, stats.generation_tokens, stats.epochs) == (20, 10, 1)
    drained = stats.drain()
    assert {name: len(values) for name, values in drained.items()} == {
        "time_to_first_token": 1,
        "inter_token": 9,
        "end_to_end": 1,
        "queued": 1,
        "hop": 2 * stats.steps,
    }
    assert not any(stats.drain().values())
    assert stats.stages[0].busy > 0 and 0 <= stats.stages[0].bubble_ratio < 1


def test_no_torch():
    code = "import sys, trireme.engine.engine, trireme.engine.sampling; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def step_tokens(step):
    from trireme.core.step import array

    return array(step.tokens).tolist()


def wait_until(what, timeout=5.0) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)
