"""Real ranks: hand-made Steps through LocalStages give transformers' tokens, over every link, and again after a kill."""

import itertools
import os
import queue
import signal
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from tiny import greedy_tokens, prompt_logits, random_prompts, tiny_checkpoint
from trireme.core.control import Fault, Found, Founded, Join, Joined, Parcel, Status, open_answer, pack_ask, seal_step
from trireme.core.devices import steps_in_flight
from trireme.core.request import Sampling
from trireme.core.settings import Settings, make_settings
from trireme.core.step import FED, Open, Step, array, first_checksum, ints, pack_step
from trireme.ranks.local import LocalStages

pytestmark = pytest.mark.ranks

PROMPT_LENS, CHUNK, NUM_TOKENS, VOCAB = (21, 5, 37), 16, 12, 251


class Truth(NamedTuple):
    """A tiny checkpoint and what transformers says of it."""

    folder: Path
    prompts: list[list[int]]
    greedy: list[list[int]]
    last_prompt: torch.Tensor  # log probabilities [len, V] at every position of the last prompt


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> Truth:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama", num_hidden_layers=3, num_attention_heads=12, num_key_value_heads=2)
    prompts = random_prompts(PROMPT_LENS)
    return Truth(folder, prompts, greedy_tokens(folder, prompts, NUM_TOKENS), prompt_logits(folder, prompts[-1]).log_softmax(-1))


class Hand:
    """A front made by hand: joins an epoch, and plans the same prefill chunks and decodes every time."""

    def __init__(self, stages: LocalStages, settings: Settings):
        self.stages, self.epoch = stages, 0
        self.meets, self.fed_back, self.inflight = settings.meets, settings.fed_back, steps_in_flight(settings)

    def post(self, stage: int, packed: bytes, rows=None) -> queue.Queue:
        box: queue.Queue = queue.Queue()
        self.stages.post(stage, Parcel(packed, rows), 30.0, box.put)
        return box

    def ask(self, stage: int, ask):
        return open_answer(self.post(stage, pack_ask(ask)).get(timeout=40).packed)

    def join(self) -> list[int]:
        """A new epoch once all stages are ready, tried again as a front does: a leader may not have seen yet that a rank is dead.
        -> process ids of all ranks"""
        every, deadline = range(self.stages.num_stages), time.monotonic() + 60
        while True:
            states = [self.ask(stage, Status()) for stage in every]
            assert time.monotonic() < deadline, states
            if all(state.state == "ready" for state in states) and self.joined():
                return [rank.pid for state in states for rank in state.ranks]
            time.sleep(0.05)

    def joined(self) -> bool:
        self.epoch += 1
        found = self.ask(0, Found(self.epoch)) if self.meets else Founded(self.epoch, "")
        if not isinstance(found, Founded):
            return False
        joins = [self.post(stage, pack_ask(Join(self.epoch, found.store))) for stage in range(self.stages.num_stages)]
        return all(isinstance(open_answer(join.get(timeout=40).packed), Joined) for join in joins)

    def generate(self, prompts: list[list[int]], *, kill: int = 0, spoil: bool = False) -> tuple[list[list[int]], list, list[Fault]]:
        """-> (tokens of each prompt, prompt logprobs of the last, faults). `kill`: a process to end after a few steps;
        `spoil`: whether the last stage fails then, at a token that the vocabulary does not have."""
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.told, self.faults = [], []
        self.flying: list[tuple[list[int], list[queue.Queue]]] = []
        planned, sampled = [0] * len(prompts), [0] * len(prompts)
        checksum, number = first_checksum(self.epoch), 0
        while min(sampled) < NUM_TOKENS and not self.faults:
            items, opens, writes = [], [], []
            for slot, prompt in enumerate(prompts):
                if number < slot or sampled[slot] == NUM_TOKENS:
                    continue
                start = planned[slot]
                count = min(CHUNK, len(prompt) - start) if start < len(prompt) else 1
                known = prompt + self.tokens[slot]
                tokens = known[start : start + count] or [FED]
                if start == 0:
                    asked = Sampling(max_tokens=NUM_TOKENS, temperature=0.0, prompt_logprobs=2 if slot == len(prompts) - 1 else None)
                    opens.append(Open(slot, asked, len(prompt), ints(prompt)))
                    writes += [(slot, index, 5 * index + slot) for index in range(4)]
                planned[slot] = start + count
                sample = planned[slot] >= len(prompt)
                sampled[slot] += sample
                items.append((slot, start, count, sample, tokens))
            slots, starts, counts, samples, tokens = zip(*items, strict=True)
            step = Step(
                self.epoch,
                number,
                *map(ints, (slots, starts, counts, samples, list(itertools.chain(*tokens)))),
                opens=opens,
                page_writes=ints(writes),
                bans=[(0, [VOCAB])] if spoil and number == 4 else [],
                returns=self.fed_back,
            )
            packed, checksum = pack_step(step, checksum)
            if number == 4 and kill:
                os.kill(kill, signal.SIGKILL)
            self.send(seal_step(packed), [slot for slot, sample in zip(slots, samples, strict=True) if sample])
            number += 1
        while self.flying:
            self.learn()
        return self.tokens, self.told, self.faults

    def send(self, packed: bytes, slots: list[int]) -> None:
        if self.fed_back:
            self.flying.append((slots, [self.post(stage, packed) for stage in range(self.stages.num_stages)]))
            if len(self.flying) == self.inflight:
                self.learn()
            return
        rows, box = None, None
        for stage in range(self.stages.num_stages):
            parcel = self.post(stage, packed, rows).get(timeout=40)
            rows = parcel.rows
            box = queue.Queue()
            box.put(parcel)
        self.flying.append((slots, [box]))
        self.learn()

    def learn(self) -> None:
        slots, boxes = self.flying.pop(0)
        for box in boxes:
            parcel = box.get(timeout=40)
            answer = open_answer(parcel.packed) if isinstance(parcel, Parcel) else parcel
            if isinstance(answer, Fault | Exception):
                self.faults.append(answer)
                continue
            for slot, token in zip(slots, array(answer.tokens).tolist() or [], strict=False):
                self.tokens[slot].append(token)
            self.told += answer.prompt_logprobs


def shared_memory() -> set[str]:
    """Files in shared memory, without those of servers that other tests may run now (`trireme_...`)."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("trireme_")}


@pytest.fixture
def led(truth):
    """led(**settings) -> (Hand, process ids) at real ranks; checks that nothing is left."""
    shared, before = shared_memory(), psutil.Process().children()  # a pool of other tests may be there
    started: list[tuple[LocalStages, Path]] = []

    def lead(**values):
        settings = make_settings({"model": str(truth.folder), "num_pages": 20, "max_num_seqs": 3, "max_model_len": 64, **values})
        run_dir = Path(tempfile.mkdtemp(prefix="trireme-test-", dir="/tmp"))
        stages = LocalStages(settings, run_dir)
        started.append((stages, run_dir))
        stages.start()
        hand = Hand(stages, settings)
        return hand, hand.join()

    yield lead
    for stages, run_dir in started:
        stages.stop()
        assert not run_dir.exists()
    assert not [child for child in psutil.Process().children() if child not in before]
    assert shared_memory() <= shared


def check(truth: Truth, found) -> None:
    tokens, told, faults = found
    assert not faults
    assert tokens == truth.greedy
    values = [value for part in sorted(told, key=lambda part: part.start) for value in part.values]
    prompt = truth.prompts[-1][1:]
    assert [value.token for value in values] == prompt
    expected = truth.last_prompt[:-1].gather(1, torch.tensor(prompt)[:, None])[:, 0]
    assert [value.value for value in values] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(("pp", "link"), [(1, "collective"), (2, "collective"), (2, "tensor"), (3, "tensor")])
def test_greedy_tokens_are_those_of_transformers(truth, led, pp, link):
    hand, _ = led(pipeline_parallel_size=pp, link=link)
    check(truth, hand.generate(truth.prompts))


def test_a_killed_rank_comes_back_and_the_others_keep_their_weights(truth, led):
    """Two stages of two ranks: neither its twin, nor the rank beside it, nor the one that is neither is started again."""
    hand, pids = led(pipeline_parallel_size=2, tensor_parallel_size=2, sequence_parallel="on", step_timeout_s=15.0)
    check(truth, hand.generate(truth.prompts))
    for victim in (1, 0, 2):
        hand.join()
        began = time.monotonic()
        _, _, faults = hand.generate(truth.prompts, kill=pids[victim])
        assert time.monotonic() - began < 20
        assert faults and {fault.kind for fault in faults} <= {"rank", "link", "stale", "unready"}
        before, pids = pids, hand.join()
        assert [rank for rank in range(4) if pids[rank] != before[rank]] == [victim]
        check(truth, hand.generate(truth.prompts))


def test_a_step_that_fails_ends_the_epoch_and_nobody(truth, led):
    hand, pids = led(pipeline_parallel_size=2, async_depth=2)
    began = time.monotonic()
    _, _, faults = hand.generate(truth.prompts, spoil=True)
    assert time.monotonic() - began < 10
    assert {"rank"} <= {fault.kind for fault in faults} <= {"rank", "link", "stale"}
    assert any("IndexError" in fault.message for fault in faults)
    assert hand.join() == pids
    check(truth, hand.generate(truth.prompts))


def test_missing_weights_are_a_sentence_that_stays(truth, tmp_path, run_dir):
    (tmp_path / "config.json").write_text((truth.folder / "config.json").read_text())
    settings = make_settings({"model": str(tmp_path)})
    stages = LocalStages(settings, run_dir / "run")
    hand = Hand(stages, settings)
    stages.start()
    try:
        deadline = time.monotonic() + 60
        while (state := hand.ask(0, Status())).state != "failed":
            assert time.monotonic() < deadline, state
            time.sleep(0.05)
        assert "safetensors" in state.detail
        assert "fix:" in state.detail
        assert hand.ask(0, Join(1)).message == state.detail
    finally:
        stages.stop()
