"""Steps travel whole, chained by checksum; anything missed, altered or out of order is refused."""

import msgspec
import numpy as np
import pytest

from trireme.core.control import (
    Fault,
    Found,
    Founded,
    Join,
    Joined,
    RankState,
    StageState,
    Status,
    open_answer,
    open_message,
    pack_answer,
    pack_ask,
    seal_step,
)
from trireme.core.refusal import Refusal
from trireme.core.request import Logprobs, Sampling
from trireme.core.step import (
    Clock,
    Open,
    Outcome,
    PromptLogprobs,
    Regime,
    Step,
    accepted,
    array,
    first_checksum,
    ints,
    pack_step,
    peek_step,
    verify_step,
)


def step(number: int, epoch: int = 3) -> Step:
    return Step(
        epoch=epoch,
        number=number,
        slots=ints([0, 4]),
        starts=ints([0, 17]),
        counts=ints([3, 1]),
        samples=ints([0, 1]),
        tokens=ints([5, 6, 7, -1]),
        opens=[Open(0, Sampling(max_tokens=4, logit_bias={3: -1.5}, bad_words=((1, 2), (3,)), stop=("x",)), 3, ints([5, 6, 7]))],
        page_writes=ints([[0, 0, 9]]),
        bans=[(1, [2, 3])],
        returns=True,
        sp=True,
    )


def test_a_step_comes_out_as_it_went_in():
    packed, checksum = pack_step(step(0), first_checksum(3))
    message = open_message(seal_step(packed))
    assert isinstance(message, memoryview)
    assert peek_step(message) == step(0)
    assert verify_step(message, first_checksum(3)) == checksum
    assert (step(0).num_rows, step(0).num_items, step(0).num_samples) == (4, 2, 1)
    assert (peek_step(message).regime, Step(0, 0, b"", b"", b"", b"", b"").regime) == (Regime(sp=True, cp=False), Regime())
    assert array(peek_step(message).tokens).tolist() == [5, 6, 7, -1]


def test_drafts_and_states_travel():
    whole = msgspec.structs.replace(
        step(0),
        counts=ints([3, 2]),
        samples=ints([0, 2]),
        tokens=ints([5, 6, 7, 8, 9]),
        replays=ints([0, 3]),
        holds=ints([0, 1]),
        restores=ints([[6, 0]]),
        saves=ints([[0, 2]]),
        nexts=ints([4, -1]),
        drafts=3,
    )
    packed, _ = pack_step(whole, first_checksum(3))
    assert peek_step(packed) == whole
    assert (whole.num_rows, whole.num_samples, whole.num_drafts) == (5, 2, 3)


@pytest.mark.parametrize(
    ("drafts", "tokens", "stand"),
    [([], [4], 0), ([5, 6, 7], [5, 6, 9, 1], 2), ([5, 6, 7], [5, 6, 7, 1], 3), ([5, 6, 7], [4, 6, 7, 1], 0)],
)
def test_drafts_stand_up_to_the_first_that_differs(drafts, tokens, stand):
    assert accepted(np.array(drafts), np.array(tokens)) == stand


def test_checksums_are_chained():
    first, after_first = pack_step(step(0), first_checksum(3))
    second, _ = pack_step(step(1), after_first)
    verify_step(second, verify_step(first, first_checksum(3)))
    with pytest.raises(Refusal, match="checksum"):
        verify_step(second, first_checksum(3))  # the first was missed
    with pytest.raises(Refusal, match="checksum"):
        verify_step(first, first_checksum(4))  # another epoch
    for place in range(len(first)):
        altered = bytes([*first[:place], first[place] ^ 1, *first[place + 1 :]])
        with pytest.raises(Refusal, match="checksum"):
            verify_step(altered, first_checksum(3))


@pytest.mark.parametrize(
    "answer",
    [
        Outcome(1, 2, 0),
        Outcome(
            1,
            2,
            1,
            tokens=ints([7]),
            logprobs=[Logprobs(7, -0.5, 1, [7, 8], [-0.5, -2.0]), None],
            prompt_logprobs=[PromptLogprobs(0, 0, [Logprobs(1, -1.0, 2, [], [])])],
            clock=Clock(1.0, 2.0, 3.0, 4.0),
        ),
        StageState(stage=1, state="healing", detail="rank 0 died", ranks=[RankState(rank=0, state="dead", pid=9)]),
        Founded(epoch=2, store="127.0.0.1:5"),
        Joined(epoch=2),
        Fault(kind="gap", message="step 3 never came", stage=1, epoch=2, number=3),
    ],
)
def test_answers_come_out_as_they_went_in(answer):
    assert open_answer(pack_answer(answer)) == answer


@pytest.mark.parametrize("ask", [Status(), Found(epoch=4), Join(epoch=4, store="127.0.0.1:5")])
def test_asks_come_out_as_they_went_in(ask):
    assert open_message(pack_ask(ask)) == ask


def test_garbage_is_an_error_not_a_step():
    with pytest.raises(msgspec.MsgspecError):
        peek_step(b"\0\0\0\0garbage")
