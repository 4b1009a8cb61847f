"""What settles a step: the drafts that stood decide where it begins, and steps are heard in their order, only as far as needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trireme.core.step import FED, Step, array, ints
from trireme.parallel.comm import LinkLost
from trireme.ranks.fed import FedTokens
from trireme.ranks.rows import lay_out
from trireme.ranks.settle import Brought, Own, Settle, ToldTokens

TABLE = np.arange(64, dtype=np.int32).reshape(4, 16)


class News:
    def __init__(self, heard: list[int], number: int, *told: int):
        self._heard, self._number, self._told = heard, number, told

    def read(self, give_up) -> np.ndarray:
        if give_up():
            raise LinkLost("given up")
        self._heard.append(self._number)
        return np.array(self._told, np.int32)


def step(number: int, *items: tuple[int, int, list[int]], drafts: int, unsettled=(), samples=None) -> Step:
    """`items`: (slot, start, tokens)."""
    slots, starts, tokens = zip(*items, strict=True)
    counts = [len(each) for each in tokens]
    return Step(
        0,
        number,
        ints(slots),
        ints(starts),
        ints(counts),
        ints(samples or counts),
        ints([token for each in tokens for token in each]),
        returns=True,
        drafts=drafts,
        replays=ints([0] * len(items)),
        unsettled=ints(unsettled),
    )


def owe(settle: Settle, owed: Step, news: News) -> None:
    settle.owe(owed, lay_out(owed, TABLE), news)


def test_an_item_begins_behind_what_stands():
    settle, heard = Settle(4, 2, depth=9), []
    # slot 3 verifies 6 and 7, of which 6 stands; slot 1's prompt samples 4; slot 0 verifies 8, which does not stand
    owe(settle, step(0, (3, 5, [5, 6, 7]), (1, 0, [1, 2, 3]), (0, 2, [2, 8]), drafts=2, samples=[3, 1, 2]),
        News(heard, 0, 6, 9, 1, 4, 3, 3, 30, 31, 40, 41, 50, 51))  # fmt: skip
    asked = step(1, (2, 7, [11]), (3, 6, [FED] * 3), (0, 3, [FED] * 2), (1, 3, [FED] * 3), drafts=2, unsettled=[1, 2, 3])
    settled = settle.settle(asked, lambda: False)
    assert array(settled.starts).tolist() == [7, 7, 3, 3]
    assert array(settled.tokens).tolist() == [11, 9, 30, 31, 3, 50, 4, 40, 41]
    assert array(settled.replays).tolist() == [0, 2, 1, 0]
    assert not settled.unsettled and settled.counts == asked.counts and heard == [0]


def test_steps_are_heard_in_turn_and_no_further_than_needed():
    settle, heard = Settle(4, 1, depth=2), []
    for number in range(4):
        owe(settle, step(number, (number, 1, [5]), drafts=1), News(heard, number, 10 + number, 20 + number))
    settled = settle.settle(step(4, (2, 2, [FED] * 2), drafts=1, unsettled=[0]), lambda: False)
    assert array(settled.tokens).tolist() == [12, 22]
    assert heard == [2], "those before are nobody's any more, and the last is not asked for"


def test_an_epoch_that_is_over_is_not_waited_for():
    settle = Settle(4, 1, depth=2)
    owe(settle, step(0, (0, 1, [5]), drafts=1), News([], 0, 6, 7))
    with pytest.raises(LinkLost):
        settle.settle(step(1, (0, 2, [FED] * 2), drafts=1, unsettled=[0]), lambda: True)


def test_nothing_is_settled_by_an_epoch_that_is_over():
    settle = Settle(4, 1, depth=2)
    owe(settle, step(0, (0, 1, [5]), drafts=1), News([], 0, 6, 7))
    next_step = step(1, (0, 2, [FED] * 2), drafts=1, unsettled=[0])
    settle.settle(next_step, lambda: False)
    settle.clear()
    with pytest.raises(AssertionError, match="in this epoch"):
        settle.settle(next_step, lambda: False)


class Link:
    """Brings messages in the order in which they are waited for."""

    def __init__(self, *messages: list[int]):
        self._messages = iter(messages)
        self.asked: list[int] = []

    def expect_tokens(self, num_samples: int):
        self.asked.append(num_samples)
        return self

    def wait(self) -> torch.Tensor:
        return torch.tensor(next(self._messages), dtype=torch.int32)


def test_what_the_link_brings_is_taken_in_the_order_of_steps():
    """Tokens alone, then tokens and drafts: the host asks for those of the second, and the table has got the first."""
    link, fed = Link([4], [5, 6, 7]), FedTokens(4, 9, torch.device("cpu"))
    slots, feeds = np.array([2]), np.array([True])
    fed.owe(0, slots, feeds, link.expect_tokens(1))
    brought = Brought(link.expect_tokens, 3, None, 1.0, lambda: fed.collect(1))
    fed.owe(1, np.array([3]), feeds, ToldTokens(brought, 1))
    assert brought.read(lambda: False).tolist() == [5, 6, 7] and link.asked == [1, 3]
    fed.await_slots(np.array([2, 3]))
    assert fed.fill(torch.tensor([FED, FED]), torch.tensor([2, 3])).tolist() == [4, 5]


def test_the_last_stage_hears_itself():
    assert Own(torch.tensor([1, 2], dtype=torch.int32), 1.0).read(lambda: False).tolist() == [1, 2]
