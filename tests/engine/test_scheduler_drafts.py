"""Drafts: who gets them, what they cost in rows and pages, and that they change no token. The toy drafts rightly two of three times."""

from __future__ import annotations

import msgspec
import pytest

from engine.driver import Driver, limits
from trireme.core.request import Request, Sampling
from trireme.core.step import FED, Step, array


def request(name: str, num_prompt: int, max_tokens: int = 30, **given) -> Request:
    return Request(id=name, prompt=[3 * i % 50 for i in range(num_prompt)], sampling=Sampling(max_tokens=max_tokens, **given))


def most_samples(steps: list[Step]) -> int:
    return max(int(array(step.samples).max()) for step in steps)


@pytest.mark.parametrize("num_snapshots", [None, 4])
@pytest.mark.parametrize("num_drafts", [1, 2, 4, 15])
def test_fewer_steps_for_the_same_tokens(num_drafts, num_snapshots):
    driver = Driver(limits(num_drafts=num_drafts, num_snapshots=num_snapshots, adaptive_drafts=False))
    driver.add(request("a", 20, max_tokens=100))
    driver.rush()
    stats = driver.scheduler.stats
    assert len(driver.output("a")) == 100 and len(driver.steps) < 80
    assert most_samples(driver.steps) == num_drafts + 1
    assert 1.4 < stats.acceptance_length < 4.5
    verified = [emission for emission in driver.emissions["a", 0] if len(emission.tokens) > 1]
    assert verified and stats.accepted_tokens >= sum(len(emission.tokens) - 1 for emission in verified)


def test_one_step_runs_ahead_of_the_last_answer():
    driver = Driver(limits(num_drafts=3, inflight=5, adaptive_drafts=False))
    driver.add(request("a", 5, max_tokens=100))
    assert driver.plan() and driver.plan() and not driver.plan()
    prompt, ahead = driver.steps
    assert prompt.settles and not prompt.unsettled and array(ahead.unsettled).tolist() == [0]
    assert array(ahead.tokens).tolist() == [FED] * 4 and array(ahead.starts).tolist() == [5]
    driver.rush()
    assert all(array(step.unsettled).tolist() == [0] for step in driver.steps[1:20])


@pytest.mark.parametrize("given", [{"fed_back": False}, {"num_stages": 3}, {"inflight": 1}])
def test_others_wait_for_their_tokens(given):
    """Stages in the middle hear nothing of the last one's tokens."""
    driver = Driver(limits(**{"num_drafts": 3, "inflight": 5, **given}))
    driver.add(request("a", 5))
    assert driver.plan() and not driver.plan()
    driver.rush()
    assert not any(step.returns or step.unsettled or FED in array(step.tokens) for step in driver.steps)


def test_nothing_unsettled_that_may_not_have_a_place():
    """Not near the limit, where it depends on what stands, nor where pages would have to be taken from others."""
    driver = Driver(limits(num_drafts=3, adaptive_drafts=False))
    driver.add(request("a", 5, max_tokens=8))
    driver.rush()
    assert [len(array(step.unsettled)) for step in driver.steps[:2]] == [0, 1]
    assert all(start + 3 + 4 < 13 for step in driver.steps[2:] if step.unsettled for start in array(step.starts))
    tight = Driver(limits(num_drafts=3, adaptive_drafts=False, num_pages=4, max_model_len=60, enable_prefix_caching=False))
    tight.add(request("a", 30, max_tokens=20))
    tight.add(request("b", 10, max_tokens=20, seed=1))
    tight.rush()
    assert tight.scheduler.stats.preemptions <= 1


def test_steps_that_leaders_tell_of_are_settled():
    driver = Driver(limits(num_drafts=3, adaptive_drafts=False))
    driver.scheduler.records = True
    driver.add(request("a", 5))
    driver.rush()
    assert most_samples(driver.steps) == 4 and not any(step.unsettled for step in driver.steps)


@pytest.mark.parametrize(
    "sampling", [{"presence_penalty": 0.5}, {"repetition_penalty": 1.1}, {"frequency_penalty": 0.1}, {"bad_words": ((1, 2),)}]
)
def test_some_have_no_drafts_and_go_as_without(sampling):
    driver = Driver(limits(num_drafts=3))
    driver.add(request("a", 5, **sampling))
    driver.rush()
    assert most_samples(driver.steps) == 1 and not any(step.drafts for step in driver.steps)
    assert any(step.returns for step in driver.steps) == ("bad_words" not in sampling)


def test_they_share_steps_with_those_that_have():
    driver = Driver(limits(num_drafts=3, inflight=3))
    driver.add(request("plain", 5, presence_penalty=0.5))
    driver.add(request("drafting", 5))
    driver.rush()
    assert any({1, 4} <= set(array(step.samples).tolist()) for step in driver.steps)
    assert any(step.returns for step in driver.steps)


def test_after_prompt_logprobs_there_are_drafts():
    driver = Driver(limits(num_drafts=3))
    driver.add(request("a", 70, prompt_logprobs=0))
    driver.rush()
    assert driver.steps[0].drafts == driver.steps[1].drafts == 0 and most_samples(driver.steps) == 4


def test_no_drafts_while_many_run():
    driver = Driver(limits(num_drafts=3, max_drafting=2, num_snapshots=0, max_num_batched_tokens=64))
    for i, max_tokens in enumerate((60, 50, 20)):
        driver.add(request(f"r{i}", 4, max_tokens=max_tokens))
    driver.rush()
    crowded = [step for step in driver.steps if step.number < 15]
    assert most_samples(crowded) == 1 and any(step.returns for step in crowded) and not any(step.drafts for step in crowded)
    assert most_samples(driver.steps) == 4
    driver.add(request("alone", 4, max_tokens=60))
    for _ in range(4):
        driver.plan(), driver.run_one(), driver.learn_one()
    before = len(driver.steps)
    for i in range(3):
        driver.add(request(f"more{i}", 4, max_tokens=60))
    for _ in range(12):
        driver.plan(), driver.run_one(), driver.learn_one()
    replays = [array(step.replays).max() for step in driver.steps[before:]]
    assert replays[0] > 0 and not any(replays[2:]), "what was held is replayed once, and then nothing is held"
    assert any(step.returns for step in driver.steps[-4:]), "fed back as without drafts"
    driver.rush()


def test_rows_are_counted_and_sequences_too():
    driver = Driver(limits(num_drafts=3, adaptive_drafts=False, max_num_seqs=8, max_num_batched_tokens=16, max_micro_batch_size=6))
    for i in range(8):
        driver.add(request(f"r{i}", 1, max_tokens=20))
    driver.rush()
    full = [step for step in driver.steps if step.num_items == 6 and most_samples([step]) > 1]
    assert full and all(step.num_rows <= 16 for step in full)
    assert any(array(step.counts).tolist()[:2] == [4, 4] for step in full), "tokens first, then drafts as rows are left"


def test_drafts_take_no_page_from_others():
    """Two that would draft into the one page left: it is not worth a preemption, and one of them stops before it needs a page."""
    tight = limits(num_pages=3, max_model_len=40, inflight=1, enable_prefix_caching=False)
    plain = Driver(tight)
    plain.add(request("a", 14, max_tokens=4))
    plain.rush()
    first, second, *_ = plain.output("a")
    assert first != second
    driver = Driver(msgspec.structs.replace(tight, num_drafts=4, adaptive_drafts=False))
    driver.add(request("a", 14, max_tokens=18, stop_token_ids=(second,)))
    driver.add(request("b", 14, max_tokens=18, seed=1))
    driver.rush()
    assert driver.output("a") == [first] and driver.scheduler.stats.preemptions == 0
    assert most_samples(driver.steps) == 5


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6])
def test_never_past_the_limit(max_tokens):
    driver = Driver(limits(num_drafts=4, adaptive_drafts=False, num_snapshots=2))
    driver.add(request("a", 16, max_tokens=max_tokens))
    driver.rush()
    assert len(driver.output("a")) == max_tokens
    assert driver.steps[0].drafts == (4 if max_tokens > 2 else 0), "the last token needs no draft"


def test_what_follows_a_stop_is_dropped():
    plain = Driver(limits())
    plain.add(request("a", 20, max_tokens=40))
    plain.rush()
    tokens = plain.output("a")
    for place in range(4, 20):
        stop = tokens[place]
        driver = Driver(limits(num_drafts=4, num_snapshots=None, adaptive_drafts=False))
        driver.add(request("a", 20, max_tokens=40, stop_token_ids=(stop,), logprobs=0))
        driver.rush()
        assert driver.output("a") == tokens[: tokens.index(stop)]
        assert driver.emissions["a", 0][-1].finish_reason == "stop"


def test_inter_token_times_are_of_tokens():
    driver = Driver(limits(num_drafts=4))
    driver.add(request("a", 20, max_tokens=40))
    while driver.scheduler._groups:
        driver.now += 1.0
        driver.plan(), driver.run_one(), driver.learn_one()
    times = driver.scheduler.stats.observed.inter_token
    assert len(times) == 39 and sum(times) == pytest.approx(len(driver.emissions["a", 0]) - 1)


def test_tokens_behind_a_stop_have_no_time():
    plain = Driver(limits())
    plain.add(request("a", 20, max_tokens=40))
    plain.rush()
    tokens = plain.output("a")
    for stop in tokens[4:20]:
        driver = Driver(limits(num_drafts=4, adaptive_drafts=False))
        driver.add(request("a", 20, max_tokens=40, stop_token_ids=(stop,)))
        driver.rush()
        assert len(driver.scheduler.stats.observed.inter_token) == max(0, len(driver.output("a")) - 1)


def test_drafts_with_prompts_in_turn_under_cp():
    driver = Driver(limits(cp=2, num_drafts=3, num_snapshots=8, max_model_len=200, num_pages=64))
    for i in range(6):
        driver.add(request(f"r{i}", 30 + 20 * i, max_tokens=20))
    driver.rush()
    assert driver.scheduler.stats.cp_steps and most_samples(driver.steps) > 1
    assert not any(step.cp for step in driver.steps if most_samples([step]) > 1)


def test_lengths_follow_what_is_accepted():
    driver = Driver(limits(num_drafts=4, max_num_seqs=8))
    driver.toy.draft = lambda entries, state, token, seed, count: [49] * count  # hardly ever right
    for i in range(40):
        driver.add(request(f"r{i}", 4, max_tokens=60))
    driver.rush()
    assert any(step.drafts == 4 for step in driver.steps[:10])
    late = [step.drafts for step in driver.steps[-100:]]
    assert late.count(0) > 90
