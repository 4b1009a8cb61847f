"""Models with states: where chunks end, what is kept, and that a sequence begins from the right copy. The toy fails where not."""

from __future__ import annotations

import pytest

from engine.driver import Driver, limits
from trireme.core.request import Request, Sampling
from trireme.core.step import PAGE, Step, array


def request(name: str, num_prompt: int, max_tokens: int = 4, **given) -> Request:
    return Request(id=name, prompt=[3 * i % 50 for i in range(num_prompt)], sampling=Sampling(max_tokens=max_tokens, **given))


def serve(driver: Driver, *requests: Request) -> list[Step]:
    """The steps of these requests alone."""
    before = len(driver.steps)
    for each in requests:
        driver.add(each)
    driver.rush()
    return driver.steps[before:]


def chunks(steps: list[Step]) -> list[int]:
    """Rows of each step that has more than one, or is the tail of a prompt."""
    firsts = [index for index, step in enumerate(steps) if step.num_samples]
    return [step.num_rows for step in steps[: firsts[0] + 1]]


@pytest.mark.parametrize(("num_prompt", "rows"), [(5, [5]), (16, [16]), (17, [16, 1]), (32, [16, 16]), (37, [32, 5]), (64, [48, 16])])
def test_the_tail_of_a_prompt_is_a_chunk_of_its_own(num_prompt, rows):
    assert chunks(serve(Driver(limits(num_snapshots=4)), request("a", num_prompt))) == rows


@pytest.mark.parametrize("without", [{"num_snapshots": None}, {"num_snapshots": 0}, {"num_snapshots": 4, "enable_prefix_caching": False}])
def test_without_reuse_prompts_are_not_parted(without):
    driver = Driver(limits(**without))
    first, second = serve(driver, request("a", 37)), serve(driver, request("b", 37))
    assert chunks(first) == [37] and not any(step.saves for step in driver.steps)
    assert chunks(second) == ([5] if without["num_snapshots"] is None else [37])


@pytest.mark.parametrize("cp", [1, 2])
def test_chunks_end_at_whole_pages(cp):
    driver = Driver(limits(num_snapshots=40, max_num_batched_tokens=100, num_stages=3, inflight=3, cp=cp))
    steps = serve(driver, *(request(f"r{n}", n) for n in (190, 150, 77)))
    ends = [
        (start + count, samples)
        for step in steps
        for start, count, samples in zip(*(array(packed).tolist() for packed in (step.starts, step.counts, step.samples)), strict=True)
    ]
    assert all(end % PAGE == 0 or samples for end, samples in ends)
    assert sum(len(step.saves) // 8 for step in steps) > 5


def test_a_prompt_goes_on_though_less_than_a_page_of_rows_is_left():
    driver = Driver(limits(num_snapshots=4, max_num_batched_tokens=16))
    for i in range(6):
        driver.add(request(f"d{i}", 4, max_tokens=40))
    for _ in range(20):
        driver.plan(), driver.run_one(), driver.learn_one()
    steps = serve(driver, request("a", 60))
    assert not any(len(step.restores) for step in steps)
    assert driver.scheduler.stats.generation_tokens == 6 * 40 + 4


def test_a_hit_goes_down_to_a_snapshot():
    driver = Driver(limits(num_snapshots=4))
    serve(driver, request("a", 100))  # chunks end at 64 and 96
    first = serve(driver, request("b", 100))[0]
    assert driver.emissions["b", 0][0].num_cached_tokens == 96 and len(first.restores) == 8
    prompt = [*request("c", 90).prompt, 7, 7, 7]  # five whole pages are known, four have a snapshot
    serve(driver, Request(id="c", prompt=prompt, sampling=Sampling(max_tokens=4)))
    assert driver.emissions["c", 0][0].num_cached_tokens == 64
    assert driver.scheduler.stats.snapshot_hits == 2 and driver.scheduler.num_snapshots_used == 3


def test_one_snapshot_is_that_of_the_latest_prompt():
    driver = Driver(limits(num_snapshots=1))
    serve(driver, request("a", 100))
    other = Request(id="b", prompt=[9] * 40, sampling=Sampling(max_tokens=4))
    serve(driver, other)
    serve(driver, request("c", 100))
    assert driver.emissions["c", 0][0].num_cached_tokens == 0 and driver.scheduler.stats.snapshot_hits == 0


def test_siblings_begin_from_the_prompt_of_the_first():
    driver = Driver(limits(num_snapshots=8, max_num_batched_tokens=512))
    serve(driver, request("a", 100, n=4))
    assert [driver.emissions["a", index][0].num_cached_tokens for index in range(4)] == [0, 96, 96, 96]


def test_siblings_do_not_wait_where_nothing_is_reused():
    driver = Driver(limits(num_snapshots=0))
    driver.add(request("a", 100, n=4))
    assert driver.scheduler.num_waiting == 4
    driver.rush()


def test_prompt_logprobs_bypass_snapshots():
    driver = Driver(limits(num_snapshots=8))
    for name in "ab":
        serve(driver, request(name, 64, prompt_logprobs=0))
    assert driver.emissions["b", 0][0].num_cached_tokens == 0 and driver.scheduler.stats.snapshot_hits == 0


def test_a_preempted_sequence_goes_on_through_a_snapshot():
    driver = Driver(limits(num_snapshots=8, max_num_seqs=1))
    driver.add(Request(id="low", prompt=list(range(40)), sampling=Sampling(max_tokens=20), priority=1))
    for _ in range(6):
        driver.plan(), driver.run_one(), driver.learn_one()
    serve(driver, request("high", 20))
    assert (driver.scheduler.stats.preemptions, driver.scheduler.stats.snapshot_hits) == (1, 1)
    assert len(driver.output("low")) == 20


def test_an_epoch_forgets_snapshots():
    driver = Driver(limits(num_snapshots=8))
    serve(driver, request("a", 100))
    driver.fault()
    assert driver.scheduler.num_snapshots_used == 0
    serve(driver, request("b", 100))
    assert driver.scheduler.stats.snapshot_hits == 0


def test_a_snapshot_is_there_for_the_next_step_not_for_its_own():
    """Pages may be known where a snapshot is not: then the step that saves one must not restore it."""
    driver = Driver(limits(num_snapshots=8, max_num_batched_tokens=512))
    serve(driver, request("a", 40))
    driver.scheduler._snapshots._rows.clear()
    step = serve(driver, request("b", 40, prompt_logprobs=0), request("c", 40))[0]
    assert len(step.saves) == 8 and not step.restores, "two save the same"
