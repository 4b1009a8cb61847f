"""Graphs and pieces without a GPU: a recording that computes again from the graph's buffers. Steps give what they give one kernel at a
time, for any number of sequences and drafts, with prompts and without, and padding changes nothing; a capture that fails leaves nothing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Semaphore, Thread

import numpy as np
import pytest
import torch

from ranks.by_hand import ByHand, Item
from tiny import random_prompts, tiny_checkpoint
from trireme.core.settings import make_settings
from trireme.core.step import Regime, Step, array, ints
from trireme.parallel.comm import LinkLost
from trireme.ranks import chains, drafter, fed, graphs, runner, sampler, staging, states
from trireme.ranks.graphs import Shape, shapes
from trireme.ranks.pieces import piece_sizes
from trireme.ranks.rows import Rows, lay_out
from trireme_kernels.delta_step import reference as delta_step
from trireme_kernels.paged_attention import reference as paged_attention

PROMPTS = random_prompts((30, 1, 16, 50))
MOST = 3


class Again:
    """A recording."""

    def __init__(self, compute: Callable[[], None]):
        compute()
        self.computes, self.compute, self.replays = compute.__qualname__, compute, 0

    def replay(self) -> None:
        assert self.compute is not None
        self.compute()
        self.replays += 1

    def reset(self) -> None:
        self.compute = None


class Turns:
    """Recordings in pieces: a thread computes again, and stops at each cut until the next piece is replayed."""

    def __init__(self, compute: Callable[[Callable[[], None]], None]):
        self._compute, self._go, self._gone = compute, Semaphore(0), Semaphore(0)
        self.pieces = [_Piece(self, 0)]
        compute(lambda: self.pieces.append(_Piece(self, len(self.pieces))))

    def replay(self, number: int) -> None:
        if number == 0:
            Thread(target=self._run, daemon=True).start()
        else:
            self._go.release()
        assert self._gone.acquire(timeout=60)

    def _run(self) -> None:
        def cut() -> None:
            self._gone.release()
            self._go.acquire()

        with torch.inference_mode():
            self._compute(cut)
        self._gone.release()


class _Piece:
    def __init__(self, turns: Turns, number: int):
        self.turns, self.number, self.replays = turns, number, 0

    def replay(self) -> None:
        self.turns.replay(self.number)
        self.replays += 1

    def reset(self) -> None:
        self.turns.pieces = []


class Records:
    """A Record."""

    def __init__(self):
        self.made: list[Again] = []
        self.in_turns: list[Turns] = []

    def __call__(self, compute: Callable[[], None]) -> Again:
        self.made.append(Again(compute))
        return self.made[-1]

    def in_pieces(self, compute: Callable[[Callable[[], None]], None]) -> list[_Piece]:
        self.in_turns.append(Turns(compute))
        return self.in_turns[-1].pieces


class Attends:
    """A CapturedDecode: as many items as there is room for, always."""

    def __init__(self, op, batch_size: int, max_pages: int):
        self._op, self._batch_size, self._max_pages = op, batch_size, max_pages

    def plan(self, kv_lens, page_table) -> None:
        assert len(kv_lens) == len(page_table) <= self._batch_size and page_table.shape[1] <= self._max_pages
        more = self._batch_size - len(kv_lens)
        lens, table = np.pad(kv_lens, (0, more), constant_values=1), np.pad(page_table, ((0, more), (0, 0)))
        self._plan = self._op.plan(np.ones_like(lens), lens, table)

    def run(self, q, k_pool, v_pool):
        assert len(q) == self._batch_size
        return self._op.run(q, k_pool, v_pool, self._plan)


class Advances:
    """A CapturedDeltaStep: nothing is done for items that are not there."""

    def __init__(self, op, num_items: int, width: int):
        self._op, self._num_items, self._width, self._counts = op, num_items, width, np.zeros(0, np.int32)

    def plan(self, counts, replays, holds) -> None:
        self._counts, self._plan = counts, self._op.plan(counts, replays, holds)

    def run(self, qkv, a, b, gate, *rest):
        *shared, slots, fresh = rest
        num_items = len(self._counts)
        assert len(qkv) == self._num_items * self._width and len(slots) == self._num_items
        out = torch.zeros_like(gate)
        if num_items:
            at = torch.from_numpy(np.concatenate([item * self._width + np.arange(count) for item, count in enumerate(self._counts)]))
            out[at] = self._op.run(qkv[at], a[at], b[at], gate[at], *shared, slots[:num_items], fresh[:num_items], self._plan)
        return out


def packed(arrays, device) -> list[torch.Tensor]:
    """staging.upload as on a GPU: one block of bytes is copied, and the one that it came from is soon another's."""
    starts = np.cumsum([0, *(-(-each.nbytes // 64) * 64 for each in arrays)]).tolist()
    host = torch.empty(starts[-1], dtype=torch.uint8)
    for place, each in zip(staging.unpack(host, starts, arrays), arrays, strict=True):
        place.numpy()[...] = each
    there = host.clone()
    host.fill_(0xAA)
    return staging.unpack(there, starts, arrays)


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Steps that runners measure which are loaded from now on, as on a GPU; arrays go there as on one, too."""
    steps, find_room = [], runner.find_room

    def find(*args, largest, decode, **more):
        for name, step in (("largest", largest), ("decode", decode)):
            step()
            steps.append(name)
        return find_room(*args, largest=largest, decode=decode, **more)

    monkeypatch.setattr(runner, "find_room", find)
    for module in (chains, drafter, fed, graphs, runner, sampler, states):
        monkeypatch.setattr(module, "upload", packed)
    return steps


@pytest.fixture
def recorded(monkeypatch) -> Records:
    """What runners record that are loaded from now on."""
    records = Records()
    monkeypatch.setattr(runner, "why_none", lambda *args: None)
    monkeypatch.setattr(runner.Runner, "_recorder", lambda *args: records)
    monkeypatch.setattr(paged_attention.Reference, "captured", lambda op, *sizes: Attends(op, *sizes))
    monkeypatch.setattr(delta_step.Reference, "captured", lambda op, *sizes: Advances(op, *sizes))
    return records


@pytest.fixture(scope="module", params=["qwen3", "qwen3_5_moe"])
def model(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("tiny"), request.param, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=2
    )


def has_head(model: Path) -> bool:
    return "qwen3_5" in (model / "config.json").read_text()


def run(model: Path, **values) -> list[list[int]]:
    """Tokens and drafts of steps with drafts of any number, that stand or do not, of sequences that join one after another."""
    drafts = MOST if has_head(model) else 0
    stages, chance = ByHand(model, mtp={"num_tokens": drafts}, **values), random.Random(0)
    texts, replays, told = [[*prompt] for prompt in PROMPTS], [0] * 4, []
    for number in range(15):
        if number < len(PROMPTS):
            stages.open(number, PROMPTS[number])
        items, most, least = [], *[(drafts, drafts), (drafts, 0), (0, 0)][number % 3]
        for slot, text in enumerate(texts[: number + 1]):
            if number % 5 == 4 and slot == 1:
                continue
            if text == PROMPTS[slot]:
                items.append(Item(slot, 0, text, 1))
                continue
            num_drafts = chance.randint(least, most)
            guesses = [chance.randrange(3, 251) for _ in range(num_drafts)]
            items.append(Item(slot, len(text) - 1, [text[-1], *guesses], 1 + num_drafts, replays[slot], holds=num_drafts > 0))
        outcome = stages.step(*items, drafts=1 + number % drafts if drafts and number % 4 else 0)
        tokens = array(outcome.tokens).tolist()
        told.append([*tokens, -1, *array(outcome.drafts).tolist()])
        for item in items:
            mine, tokens = tokens[: item.samples], tokens[item.samples :]
            stood = chance.randint(0, item.samples - 1) if item.holds else 0
            # whatever was sampled, some drafts are said to have stood: what states take is then what was written
            replays[item.slot] = 1 + stood if item.holds else 0
            texts[item.slot] += [*list(item.tokens[1 : 1 + stood]), mine[stood]]
    stages.begin()
    return told + run_again(stages, texts)


def run_again(stages: ByHand, texts: list[list[int]]) -> list[list[int]]:
    """In another epoch all is computed anew."""
    for slot, text in enumerate(texts):
        stages.open(slot, text)
    items = [Item(slot, 0, text, 1) for slot, text in enumerate(texts)]
    firsts = array(stages.step(*items).tokens).tolist()
    items = [Item(slot, len(text), [token], 1) for (slot, text), token in zip(enumerate(texts), firsts, strict=True)]
    return [firsts, array(stages.step(*items).tokens).tolist()]


@pytest.mark.parametrize("num_stages", [1, 2])
def test_steps_give_what_they_give_without_graphs(model, recorded, measured, monkeypatch, num_stages):
    found, num_replays = run(model, pipeline_parallel_size=num_stages, max_num_batched_tokens=64), Counter()
    assert measured == ["largest", "decode"] * num_stages
    for recording in recorded.made:
        num_replays[recording.computes] += recording.replays
    assert num_replays["Graph.compute"] > 10 * num_stages
    in_pieces = [[piece.replays for piece in turns.pieces] for turns in recorded.in_turns]
    assert all(len({*replays}) == 1 and len(replays) > 1 for replays in in_pieces)
    assert sum(replays[0] for replays in in_pieces) >= 3 * num_stages  # steps with prompts
    if has_head(model):
        assert num_replays["_Chain._go_on"] > 5 < num_replays["_Chain._pass"]
    monkeypatch.undo()  # what is compared with has none of it
    assert found == run(model, pipeline_parallel_size=num_stages)


@pytest.mark.parametrize("values", [{}, {"sequence_parallel": 3}], ids=["tp2", "tp2 sp"])
def test_so_do_ranks_of_a_stage(model, recorded, monkeypatch, values):
    """Each epoch captures its own."""
    told = []
    for why in (None, "eager"):
        monkeypatch.setattr(runner, "why_none", lambda *args, why=why: why)
        told.append(run(model, tensor_parallel_size=2, **values))
    assert told[0] == told[1] and recorded.made[0].compute is None


def test_a_shape_for_every_regime_that_a_front_may_ask_for(model, recorded):
    [only] = ByHand(model, max_num_seqs=6).runners
    made = shapes(make_settings({"model": "m", "max_num_seqs": 6, "mtp": {"max_batch_size": 2}}), only._decoder)
    plain = Regime()
    narrow = [Shape(6, 1, plain), Shape(4, 1, plain), Shape(2, 1, plain), Shape(1, 1, plain)]
    assert [shape for shape in made if shape.width == 1] == narrow
    drafts = only._decoder.build.plan.mtp
    assert len(made) == len(narrow) + 2 * drafts and made == sorted(made, key=lambda shape: -shape.num_rows)


def test_a_capture_that_fails_leaves_nothing(model, recorded):
    [only] = ByHand(model).runners
    graphs, made = only._graphs, Records()

    class Lost(Records):
        def __call__(self, compute: Callable[[], None]) -> Again:
            if len(made.made) == 2:
                raise LinkLost("gone")
            return made(compute)

    with pytest.raises(LinkLost):
        graphs.capture(Lost())
    assert all(recording.compute is None for recording in made.made)


def test_pieces_that_cannot_be_captured_leave_nothing(model, recorded):
    [only] = ByHand(model, max_num_batched_tokens=300).runners
    pieces, made = only._pieces, Records()

    class Lost(Records):
        def in_pieces(self, compute: Callable[[Callable[[], None]], None]) -> list[_Piece]:
            if len(made.in_turns) == 2:
                raise LinkLost("gone")
            return made.in_pieces(compute)

    with pytest.raises(LinkLost), torch.inference_mode():
        pieces.capture(Lost())
    assert not any(turns.pieces for turns in made.in_turns)
    assert pieces.find(rows_of_step(5), Regime()) is None


def test_a_step_has_the_pieces_of_the_least_bucket_that_holds_it(model, recorded):
    [only] = ByHand(model, max_num_batched_tokens=300).runners
    found = {num_rows: only._pieces.find(rows_of_step(num_rows), Regime()) for num_rows in (1, 64, 65, 257, 384, 385)}
    assert [each and each.num_rows for each in found.values()] == [64, 64, 128, 384, 384, None]
    assert only._pieces.find(rows_of_step(5), Regime(sp=True)) is None


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ({"max_num_batched_tokens": 8192}, [1024, 768, 512, 384, 256, 192, 128, 64]),
        ({"max_num_batched_tokens": 64}, [64]),
        ({"sequence_parallel": 66}, [128, 64]),
        ({"sequence_parallel": 1}, []),
    ],
    ids=str,
)
def test_pieces_are_of_steps_without_sequence_parallelism(values, sizes):
    assert piece_sizes(make_settings({"model": "m", "tensor_parallel_size": 2, **values}), torch.device("cpu")) == sizes


def rows_of_step(num_rows: int) -> Rows:
    zeros = ints([0])
    return lay_out(Step(0, 0, zeros, zeros, ints([num_rows]), zeros, ints([3] * num_rows)), np.zeros((1, 99), np.int32))
