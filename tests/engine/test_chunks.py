"""Chunks of equal time: published numbers, a pipeline's chunks in seconds, and fits of measured steps."""

from __future__ import annotations

import numpy as np
import pytest

from engine.driver import Driver, limits
from trireme.core.request import Request, Sampling
from trireme.core.step import Clock, array
from trireme.engine.chunks import ChunkCost, ChunkSizer, chunk_rows
from trireme.engine.fit import fit

GOLDEN = ChunkCost(pair=1e-6, row=0.01)


@pytest.mark.parametrize(("start", "rows"), [(0, 4096), (8192, 2496), (32768, 1536), (131072, 1152)])
def test_published_numbers(start, rows):
    """SGLang's dynamic_chunk_sizer (facts/seeds.md 1.1)."""
    assert chunk_rows(GOLDEN, start, 4096) == rows


def test_a_linear_model_keeps_its_chunks():
    assert [chunk_rows(ChunkCost(pair=0.0, row=0.01), start, 4096) for start in (0, 8192, 131072)] == [4096] * 3


def test_a_prefix_that_costs_shortens_chunks():
    assert chunk_rows(ChunkCost(pair=0.0, row=0.01, prefix=1e-3), 20_000, 4096) == 2560  # 20 of 41 s are left: smoothed 2596


def test_small_steps_keep_their_size():
    assert chunk_rows(GOLDEN, 10**6, 32) == 32
    assert chunk_rows(ChunkCost(0.0, 0.0), 10**6, 512) == 512


def seconds(cost: ChunkCost, start: int, count: int) -> float:
    return cost.pair * (count**2 + 2 * start * count) + cost.row * count + cost.prefix * start + cost.step


def prefill(cost: ChunkCost, length: int, size) -> list[float]:
    """Seconds of each chunk."""
    times, start = [], 0
    while start < length:
        count = min(size(start), length - start)
        times.append(seconds(cost, start, count))
        start += count
    return times


@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_pipeline_ends_sooner(num_stages):
    """A prompt's chunks follow one another through the stages: the longest holds up all the others."""
    cost = ChunkCost(pair=2e-10, row=4e-6, step=1e-3)

    def span(times: list[float]) -> float:
        ends = [0.0] * num_stages
        for each in times:
            for stage in range(num_stages):
                ends[stage] = max(ends[stage], ends[stage - 1] if stage else 0.0) + each / num_stages
        return ends[-1]

    fixed = prefill(cost, 131_072, lambda start: 8192)
    equal = prefill(cost, 131_072, lambda start: chunk_rows(cost, start, 8192))
    assert max(equal) < max(fixed) / 1.5
    assert span(equal) < span(fixed)


def test_a_fit_finds_what_the_steps_cost():
    rng = np.random.default_rng(0)
    cost = ChunkCost(pair=3e-10, row=5e-6, prefix=1e-7, step=2e-3)
    rows = []
    for _ in range(64):
        starts, counts = rng.integers(0, 60_000, 3).astype(float), rng.integers(1, 4000, 3).astype(float)
        pairs = (counts**2 + 2 * starts * counts).sum()
        time = cost.pair * pairs + cost.row * counts.sum() + cost.prefix * starts.sum() + cost.step
        rows.append((pairs, counts.sum(), starts.sum(), 1.0, time * rng.normal(1, 0.01)))
    found = ChunkCost(*fit(np.array(rows)))
    assert found.pair == pytest.approx(cost.pair, rel=0.1)
    assert found.row == pytest.approx(cost.row, rel=0.3)
    assert min(found) >= 0


def test_a_step_that_compiled_says_nothing():
    rng = np.random.default_rng(1)
    rows = [(float(count) ** 2, float(count), 0.0, 1.0, seconds(GOLDEN, 0, count) * rng.normal(1, 0.01)) for count in range(256, 4096, 64)]
    rows[3] = (*rows[3][:4], 500.0)
    assert chunk_rows(ChunkCost(*fit(np.array(rows))), 32768, 4096) == pytest.approx(1536, abs=192)


def test_no_term_is_negative():
    """Steps that get faster with their prefix are noise, not a cost below zero."""
    samples = np.array([(0.0, 100.0 + k, 1000.0 * k, 1.0, 1.0 - 1e-3 * k) for k in range(20)])
    assert min(fit(samples)) >= 0


def test_the_sizer_waits_for_samples():
    sizer = ChunkSizer(4096)
    for number in range(12):
        assert number >= 8 or sizer.rows(131_072) == 4096
        start, count = 9000 * number, 4096 - 256 * number
        sizer.learn(np.array([start]), np.array([count]), seconds(GOLDEN, start, count))
    assert [sizer.rows(start) for start in (0, 8192, 32768, 131072)] == [4096, 2496, 1536, 1152]


def test_decodes_say_nothing_of_chunks():
    """Alone they are no sample; beside a chunk they are a part of what its step costs."""
    sizer, decodes = ChunkSizer(4096), np.full(100, 30_000)
    for number in range(12):
        start, count = 9000 * number, 4096 - 256 * number
        sizer.learn(np.array([start, *decodes]), np.array([count, *np.ones(100, int)]), seconds(GOLDEN, start, count) + 0.5)
        sizer.learn(decodes, np.ones(100, int), 9.0)
    assert [sizer.rows(start) for start in (0, 8192, 32768, 131072)] == [4096, 2496, 1536, 1152]


def test_a_long_prompts_chunks_take_equally_long():
    """The scheduler measures steps while it plans; chunks of the second prompt are fitted to those of the first."""
    cost = ChunkCost(pair=2e-8, row=1e-5, step=1e-4)
    driver = Driver(limits(max_model_len=8192, num_pages=1100, max_num_batched_tokens=512, num_stages=2, inflight=3, dynamic_chunks=True))
    sizes: list[list[int]] = []
    for name in ("first", "second"):
        driver.add(Request(id=name, prompt=[(7 + len(name)) % 50] * 8000, sampling=Sampling(max_tokens=1, prompt_logprobs=0)))
        begun = len(driver.steps)
        while driver.plan():
            while driver.posted:
                driver.run_one()
            while driver.answers:
                driver.learn_one()
            step = driver.steps[-1]
            clock = Clock(busy=seconds(cost, int(array(step.starts)[0]), step.num_rows))
            driver.scheduler.time(step, [clock], was_idle=False)
        sizes.append([step.num_rows for step in driver.steps[begun:]])
    usual, fitted = sizes
    assert usual[:8] == [500] * 8 and sum(usual) == sum(fitted) == 8000  # 16 equal steps, while too little is known
    starts = np.cumsum([0, *fitted[:-1]])
    wanted = [chunk_rows(cost, start, 512) for start in starts]
    assert all(0.8 * rows <= count <= rows for count, rows in zip(fitted[:-2], wanted, strict=False))
    times = [seconds(cost, start, count) for start, count in zip(starts, fitted, strict=True)]
    assert max(times) < seconds(cost, 7500, 500) / 1.5


def test_chunks_shrink_beside_many_that_decode():
    """As many decode as a shrunken chunk has rows: the prompt goes on all the same."""
    wide = {"max_model_len": 1100, "num_pages": 4000, "max_num_seqs": 160, "max_num_batched_tokens": 128}
    driver = Driver(limits(num_stages=2, inflight=3, dynamic_chunks=True, **wide))
    for _ in range(8):  # rows of which the last cost four times as much as the first
        driver.scheduler._chunks.learn(np.array([0]), np.array([128]), seconds(ChunkCost(pair=1e-6, row=1e-5), 0, 128))
        driver.scheduler._chunks.learn(np.array([900]), np.array([128]), seconds(ChunkCost(pair=1e-6, row=1e-5), 900, 128))
    for i in range(140):
        driver.add(Request(id=f"d{i}", prompt=[1, 2], sampling=Sampling(max_tokens=60)))
    for _ in range(10):
        driver.plan(), driver.run_one(), driver.learn_one()
    driver.add(Request(id="long", prompt=[3] * 1000, sampling=Sampling(max_tokens=1)))
    begun = len(driver.steps)
    while not driver.emissions["long", 0]:
        driver.plan(), driver.run_one(), driver.learn_one()
    assert driver.scheduler.num_running >= 140 and len(driver.steps) - begun < 80
