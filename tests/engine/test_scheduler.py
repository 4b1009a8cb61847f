"""Whatever the schedule, every sequence gets the toy model's own tokens, and pages return to zero."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.driver import Driver, limits, make_request
from trireme.core.refusal import Refusal
from trireme.core.request import Request, Sampling
from trireme.core.step import FED, array


def request(name: str, num_prompt: int, max_tokens: int = 8, **given) -> Request:
    sampling = Sampling(max_tokens=max_tokens, **given.pop("sampling", {}))
    return Request(id=name, prompt=[(len(name) * 31 + i * i) % 50 for i in range(num_prompt)], sampling=sampling, **given)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    fed_back=st.booleans(),
    inflight=st.integers(1, 5),
    num_stages=st.integers(1, 4),
    rows=st.sampled_from([16, 24, 64, 200]),
    num_pages=st.sampled_from([13, 20, 64]),
    prefix=st.booleans(),
    micro=st.sampled_from([None, None, 1, 3]),
    cp=st.sampled_from([1, 2, 4]),
    sp_from=st.sampled_from([None, 1, 2, 8, 60]),
    num_snapshots=st.sampled_from([None, None, 0, 1, 3, 20]),
    num_drafts=st.sampled_from([0, 0, 1, 3, 4, 15]),
    adaptive=st.booleans(),
    max_drafting=st.sampled_from([0, 1, 3, 32]),
)
def test_any_schedule_gives_the_same_tokens(
    seed,
    fed_back,
    inflight,
    num_stages,
    rows,
    num_pages,
    prefix,
    micro,
    cp,
    sp_from,
    num_snapshots,
    num_drafts,
    adaptive,
    max_drafting,
):
    rng = random.Random(seed)
    driver = Driver(
        limits(
            fed_back=fed_back,
            inflight=inflight,
            num_stages=num_stages,
            max_num_batched_tokens=rows,
            num_pages=num_pages,
            enable_prefix_caching=prefix,
            max_micro_batch_size=micro,
            cp=cp,
            sp_from=sp_from,
            max_num_seqs=rng.choice([1, 3, 8]),
            max_model_len=rng.choice([110, 200]),
            num_snapshots=num_snapshots,
            num_drafts=num_drafts,
            adaptive_drafts=adaptive,
            max_drafting=max_drafting,
        ),
        seed,
    )
    coming = [make_request(rng, f"r{i}", deadline=rng.choice([None] * 6 + [0.05])) for i in range(rng.randint(1, 10))]
    for _ in range(rng.randint(50, 400)):
        driver.now += 0.0005
        kind = rng.random()
        if kind < 0.1 and coming:
            driver.add(coming.pop())
        elif kind < 0.12 and driver.requests:
            name = rng.choice(list(driver.requests))
            driver.hear(driver.scheduler.cancel(name, index=rng.choice([None, 0, 1])))
        elif kind < 0.13:
            driver.fault(error=RuntimeError("no progress") if rng.random() < 0.3 else None)
        elif kind < 0.15:
            driver.hear(driver.scheduler.expire())
        else:
            rng.choice([driver.plan, driver.run_one, driver.learn_one])()
    for late in coming:
        driver.add(late)
    driver.finish()


@pytest.mark.parametrize("num_stages, inflight", [(1, 1), (1, 2), (2, 2), (2, 3), (4, 5)])
@pytest.mark.parametrize("fed_back", [True, False])
@pytest.mark.parametrize("rows", [16, 64, 512])
def test_full_pipeline(num_stages, inflight, fed_back, rows):
    driver = Driver(limits(num_stages=num_stages, inflight=inflight, fed_back=fed_back, max_num_batched_tokens=rows))
    rng = random.Random(rows)
    for i in range(12):
        driver.add(make_request(rng, f"r{i}"))
    driver.rush()


@pytest.mark.parametrize("num_pages", [20, 64])
def test_cp_changes_no_token(num_pages):
    outputs = []
    for cp in (1, 2, 4):
        driver = Driver(limits(cp=cp, num_stages=2, inflight=3, num_pages=num_pages), seed=cp)
        rng = random.Random(7)
        for i in range(10):
            driver.add(make_request(rng, f"r{i}"))
        driver.finish()
        outputs.append({key: driver.output(*key) for key in sorted(driver.emissions)})
    assert outputs[0] == outputs[1] == outputs[2]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    num_stages=st.integers(1, 4),
    async_depth=st.integers(0, 2),
    fed_back=st.booleans(),
    rows=st.sampled_from([16, 64, 200]),
    cp=st.sampled_from([2, 4]),
)
def test_neither_prompts_nor_decodes_starve(seed, num_stages, async_depth, fed_back, rows, cp):
    inflight, rng = num_stages + async_depth, random.Random(seed)
    wide = {"num_pages": 400, "max_num_seqs": 12, "max_num_batched_tokens": rows}
    driver = Driver(limits(cp=cp, num_stages=num_stages, inflight=inflight, fed_back=fed_back, **wide), seed)
    for i in range(20):
        driver.add(request(f"r{i}", rng.randint(1, 150), max_tokens=rng.randint(1, 40)))
        for _ in range(rng.choice([1, 10, 60])):
            rng.choice([driver.plan, driver.run_one, driver.learn_one])()
    driver.finish()
    most_steps_between = inflight + 4 * -(-num_stages // 2) + 2  # one that waits for its token, then its turn among the others
    prompts: set[int] = set()  # slots with prompt rows left
    decoded: dict[int, int] = {}  # by slot that decodes: the last step that named it
    num_without_prompts = 0  # steps in a row that held none of the rows left
    for step in driver.steps:
        slots, samples = array(step.slots).tolist(), array(step.samples).tolist()
        prompts |= {opened.slot for opened in step.opens}
        num_without_prompts = 0 if not prompts or prompts & set(slots) else num_without_prompts + 1
        assert num_without_prompts <= 1
        for slot, sampled in zip(slots, samples, strict=True):
            if slot in prompts:
                decoded.pop(slot, None)  # of the slot's last sequence
            elif slot in decoded:
                assert step.number - decoded[slot] <= most_steps_between
            if sampled:
                prompts.discard(slot)
                decoded[slot] = step.number


def test_prompts_and_decodes_take_turns_with_cp():
    driver = Driver(limits(cp=2, max_model_len=900))
    driver.add(request("decoding", 4, max_tokens=50))
    driver.plan(), driver.run_one(), driver.learn_one()
    driver.add(request("long", 500, max_tokens=4))
    while driver.scheduler.num_queued or driver.scheduler._prompts:
        driver.plan(), driver.run_one(), driver.learn_one()
    assert [step.num_rows for step in driver.steps[1:]] == [1, 64] * 7 + [1, 52], "the prompt's end is sampled in its own step"
    assert driver.steps[-1].num_samples == 1
    driver.rush()


@pytest.mark.parametrize(
    ("cp", "prompts", "is_on"),
    [
        (1, [64], False),
        (2, [3], False),
        (2, [4], True),
        (4, [7], False),
        (4, [8], True),
        (4, [8, 7], True),
        (4, [9, 3, 3, 3], True),  # half of the rows can be cut
        (4, [9, 4, 3, 3], False),
        (4, [7, 7, 7], False),
    ],
)
def test_cp_is_on_where_half_of_the_rows_can_be_cut(cp, prompts, is_on):
    driver = Driver(limits(cp=cp, enable_prefix_caching=False))
    for i, num_prompt in enumerate(prompts):
        driver.add(request(f"r{i}", num_prompt, max_tokens=2))
    driver.rush()
    first, *decodes = driver.steps
    assert (first.num_rows, first.cp, any(step.cp for step in decodes)) == (sum(prompts), is_on, False)
    stats = driver.scheduler.stats
    assert (stats.cp_steps, stats.cp_fallbacks) == (int(is_on), int(cp > 1 and not is_on))


def test_sp_is_on_from_a_number_of_rows():
    driver = Driver(limits(sp_from=3, max_num_seqs=4))
    for i in range(4):
        driver.add(request(f"r{i}", 2, max_tokens=1 + 2 * i))
    driver.rush()
    assert [(step.num_rows, step.sp) for step in driver.steps] == [
        (8, True),
        (3, True),
        (3, True),
        (2, False),
        (2, False),
        (1, False),
        (1, False),
    ]
    assert driver.scheduler.stats.sp_steps == 3


def test_fed_back_runs_ahead_of_its_tokens_and_never_past_the_limit():
    driver = Driver(limits(inflight=5))
    driver.add(request("a", 5, max_tokens=3))
    while driver.plan():
        pass
    assert [array(step.tokens).tolist() for step in driver.steps[1:]] == [[FED], [FED]]
    assert [step.returns for step in driver.steps] == [True, True, False]
    driver.rush()


def test_bad_words_of_several_tokens_wait_for_the_token():
    driver = Driver(limits(inflight=5))
    driver.add(request("a", 5, sampling={"bad_words": ((1, 2),)}))
    assert driver.plan() and not driver.plan()
    assert not driver.steps[0].returns
    driver.rush()
    assert not any(FED in array(step.tokens).tolist() for step in driver.steps)


def test_decodes_are_spread_over_the_stages():
    driver = Driver(limits(num_stages=4, inflight=4, max_num_seqs=16, max_num_batched_tokens=512))
    for i in range(8):
        driver.add(request(f"r{i}", 4, max_tokens=20))
    while any(len(s.tokens) // 4 != s.num_items for s in driver.steps[-4:]) or len(driver.steps) < 20:
        driver.plan()
        if len(driver.named) == 4:
            driver.run_one()
            driver.learn_one()
    assert {step.num_items for step in driver.steps[-8:]} == {2}
    last = [set(array(step.slots).tolist()) for step in driver.steps[-4:]]
    assert len(set.union(*last)) == 8, "each sequence is in one of num_stages consecutive steps"
    driver.rush()


def test_steps_that_take_turns_read_equally_many_keys():
    """Long prompts came first, so the first of two steps in turn would read most keys; as sequences end, they even out."""
    driver = Driver(limits(num_stages=2, inflight=3, max_num_seqs=24, max_num_batched_tokens=1024, num_pages=400, max_model_len=400))
    for i in range(24):
        driver.add(request(f"r{i}", 300 if i < 12 else 20, max_tokens=8 + 2 * i))
    while driver.plan() or driver.posted or driver.answers:
        if len(driver.named) == 3 or not driver.plan():
            driver.run_one()
            driver.learn_one()
    decodes = [step for step in driver.steps if step.num_rows == step.num_items > 4]
    keys = np.array([array(step.starts).sum() + step.num_items for step in decodes])
    uneven = np.abs(np.diff(keys)) / (keys[1:] + keys[:-1]) * 2
    assert len(uneven) > 40 and np.median(uneven) < 0.12, uneven
    assert max(abs(a.num_items - b.num_items) for a, b in pairwise(decodes)) <= 2


def test_chunks_of_one_prompt_are_in_flight_together():
    driver = Driver(limits(num_stages=3, inflight=3, max_num_batched_tokens=128))
    driver.add(request("a", 190, max_tokens=4))
    while driver.plan():
        pass
    assert [step.num_rows for step in driver.steps] == [64, 64, 62]
    driver.rush()


def test_a_hit_computes_at_least_one_token():
    driver = Driver(limits())
    for name in "ab":
        driver.add(Request(id=name, prompt=[3] * 64, sampling=Sampling(max_tokens=2)))
        driver.rush()
    assert driver.emissions["b", 0][0].num_cached_tokens == 48
    assert driver.scheduler.stats.cached_tokens == 48


def test_prompt_logprobs_bypass_reuse():
    driver = Driver(limits())
    for name in "ab":
        driver.add(Request(id=name, prompt=[3] * 64, sampling=Sampling(max_tokens=2, prompt_logprobs=0)))
        driver.rush()
    assert driver.emissions["b", 0][0].num_cached_tokens == 0


def test_requests_that_ask_for_experts_bypass_reuse():
    """Also siblings, which then do not wait for each other; beside them nothing is told."""
    driver = Driver(limits(max_num_batched_tokens=512))
    for name, asks in (("a", False), ("b", True), ("c", False)):
        driver.add(Request(id=name, prompt=[3] * 64, sampling=Sampling(max_tokens=2, n=2), routed_experts=asks))
        driver.rush()
    assert [driver.emissions[name, 0][0].num_cached_tokens for name in "abc"] == [0, 0, 48]
    assert driver.emissions["b", 1][0].num_cached_tokens == 0
    assert [step.num_routed for step in driver.steps if step.routed] == [128, 2]


def test_siblings_reuse_the_prompt_of_the_first():
    driver = Driver(limits(max_num_batched_tokens=512))
    driver.add(request("a", 100, sampling={"n": 4}))
    driver.rush()
    assert [driver.emissions["a", index][0].num_cached_tokens for index in range(4)] == [0, 96, 96, 96]
    assert len({tuple(driver.output("a", index)) for index in range(4)}) > 1, "each has a seed of its own"


def test_short_prompts_and_decodes_pass_a_long_one():
    driver = Driver(limits(max_model_len=4000, num_pages=400, max_num_batched_tokens=100, inflight=1))
    driver.add(request("decoding", 4, max_tokens=50))
    driver.plan(), driver.run_one(), driver.learn_one()
    driver.add(request("long", 2000, max_tokens=1))
    driver.add(request("longer", 1500, max_tokens=1))
    for i in range(3):
        driver.add(request(f"short{i}", 10 + i, max_tokens=1))
    driver.plan(), driver.run_one(), driver.learn_one()
    step = driver.steps[-1]
    assert array(step.counts).tolist()[0] == 1, "decodes go first"
    assert sorted(array(step.counts).tolist()[1:]) == [10, 11, 12, 16, 50], "half to the oldest, half to the shortest"
    assert all(driver.emissions[f"short{i}", 0][-1].finish_reason for i in range(3))
    driver.rush()


def test_priority_goes_first_and_takes_a_slot():
    driver = Driver(limits(max_num_seqs=1))
    driver.add(request("low", 20, max_tokens=20, priority=1))
    for _ in range(3):
        driver.plan(), driver.run_one(), driver.learn_one()
    driver.add(request("high", 20, max_tokens=4, priority=0))
    driver.rush()
    assert driver.scheduler.stats.preemptions == 1
    order = list(driver.emissions)
    assert order == [("low", 0), ("high", 0)] and len(driver.output("low")) == 20


def test_preempts_the_youngest():
    driver = Driver(limits(num_pages=13, max_num_seqs=4, inflight=2, enable_prefix_caching=False))
    for i in range(4):
        driver.add(request(f"r{i}", 40, max_tokens=60))
    first_end = None
    while driver.scheduler._groups:
        driver.plan(), driver.run_one(), driver.learn_one()
        ended = [name for (name, _), heard in driver.emissions.items() if heard[-1].finish_reason]
        first_end = first_end or (ended and ended[0])
    driver.rush()
    assert driver.scheduler.stats.preemptions > 0 and first_end == "r0"


def test_the_older_need_not_wait_for_a_page_of_the_younger():
    driver = Driver(limits(num_pages=12, enable_prefix_caching=False))
    driver.add(request("older", 60, max_tokens=40))
    driver.add(request("younger", 50, max_tokens=50))
    driver.rush()
    assert driver.scheduler.stats.preemptions == 1


def test_bans_hold_over_faults():
    words = tuple((first, last) for first in range(50) for last in range(25))  # after any token, half of the vocabulary
    driver = Driver(limits())
    driver.add(request("a", 5, max_tokens=30, sampling={"bad_words": words}))
    while driver.scheduler.num_running or driver.scheduler.num_waiting:
        driver.plan(), driver.run_one(), driver.learn_one()
        driver.fault()
    driver.check()
    assert min(driver.output("a")[1:]) >= 25


def test_refusals():
    driver = Driver(limits(max_queue_size=2, num_pages=5, max_model_len=100))
    for bad, words in [
        (request("a", 100), "max_model_len is 100"),
        (request("a", 0), "no tokens"),
        (request("a", 50, max_tokens=40), "need 6 pages"),
    ]:
        with pytest.raises(Refusal, match=words):
            driver.add(bad)
    driver.add(request("a", 50, max_tokens=30))
    with pytest.raises(Refusal, match="in use"):
        driver.add(request("a", 5))
    driver.add(request("b", 5))
    with pytest.raises(Refusal, match="queue is full") as refused:
        driver.add(request("c", 5))
    assert refused.value.kind == "unavailable"
    driver.rush()


def test_max_model_len_ends_with_length():
    driver = Driver(limits(max_model_len=40))
    driver.add(request("a", 30, max_tokens=100))
    driver.rush()
    assert len(driver.output("a")) == 10 and driver.emissions["a", 0][-1].finish_reason == "length"


def test_cancel_frees_pages_only_when_the_steps_have_returned():
    driver = Driver(limits(inflight=3, enable_prefix_caching=False))
    driver.add(request("a", 40))
    assert driver.plan() and driver.plan()
    driver.hear(driver.scheduler.cancel("a"))
    assert driver.emissions["a", 0][-1].finish_reason == "cancelled" and driver.scheduler.num_pages_used == 3
    driver.run_one(), driver.learn_one()
    assert driver.scheduler.num_pages_used == 3
    driver.run_one(), driver.learn_one()
    assert driver.scheduler.num_pages_used == 0


def test_deadline():
    driver = Driver(limits())
    driver.add(request("a", 40, deadline=1.0))
    driver.add(request("b", 40))
    assert driver.scheduler.next_deadline == 1.0 and driver.scheduler.expire() == []
    driver.now = 1.0
    driver.hear(driver.scheduler.expire())
    assert driver.emissions["a", 0][-1].error.kind == "deadline" and driver.scheduler.next_deadline is None
    driver.rush()


def test_a_step_that_breaks_every_epoch_is_given_up():
    driver = Driver(limits(max_num_seqs=1))
    driver.add(request("poison", 20))
    driver.add(request("good", 20))
    for _ in range(3):
        assert driver.plan()
        driver.fault(error=RuntimeError("stage_1 fell over"))
    assert "stage_1 fell over" in str(driver.emissions["poison", 0][-1].error)
    driver.rush()
    assert driver.emissions["good", 0][-1].finish_reason == "length"


def test_progress_forgives_faults():
    driver = Driver(limits())
    driver.add(request("a", 20, max_tokens=30))
    for _ in range(10):
        for _ in range(4):
            driver.plan(), driver.run_one(), driver.learn_one()
        driver.plan()
        driver.fault(error=RuntimeError("killed"))
    driver.rush()
    assert driver.emissions["a", 0][-1].finish_reason == "length"


def test_fewer_pages_after_a_repair():
    driver = Driver(limits())
    driver.add(request("big", 150, max_tokens=50))
    driver.add(request("small", 30, max_tokens=10))
    driver.plan()
    driver.toy.num_pages = 5
    driver.fault(num_pages=5)
    assert driver.emissions["big", 0][-1].finish_reason == "error"
    driver.rush()
    assert driver.emissions["small", 0][-1].finish_reason == "length"
