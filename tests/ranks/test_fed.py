"""Tokens fed back: taken in step order, as late as possible, never one that nobody needs."""

import numpy as np
import pytest
import torch

from trireme.core.step import FED
from trireme.ranks.fed import FedTokens


class Return:
    def __init__(self, log: list[int], *tokens: int):
        self.log, self.tokens = log, tokens

    def wait(self) -> torch.Tensor:
        self.log.append(self.tokens[0])
        return torch.tensor(self.tokens, dtype=torch.int32)


def make_fed(num_slots: int, depth: int) -> FedTokens:
    return FedTokens(num_slots, depth, torch.device("cpu"))


def owe(fed: FedTokens, number: int, slots: list[int], tokens: Return, feeds: list[bool] | None = None) -> None:
    fed.owe(number, np.array(slots), np.array(feeds or [True] * len(slots)), tokens)


def filled(fed: FedTokens, tokens: list[int], slots: list[int]) -> list[int]:
    known, rows = np.array(tokens), np.array(slots)
    fed.await_slots(rows[known == FED])
    return fed.fill(torch.from_numpy(known), torch.from_numpy(rows)).tolist()


def test_returns_are_taken_up_to_the_one_needed():
    fed, log = make_fed(4, depth=9), []
    owe(fed, 0, [0, 1], Return(log, 10, 11))
    owe(fed, 1, [2], Return(log, 20))
    owe(fed, 2, [3], Return(log, 30))
    assert filled(fed, [5, 6], [0, 1]) == [5, 6]
    assert log == []
    assert filled(fed, [FED, 7, FED], [1, 3, 0]) == [11, 7, 10]
    assert log == [10]
    assert filled(fed, [FED], [3]) == [30]
    assert log == [10, 20, 30]


def test_the_latest_token_of_a_slot_counts():
    fed, log = make_fed(1, depth=9), []
    owe(fed, 0, [0], Return(log, 10))
    owe(fed, 1, [0], Return(log, 11))
    assert filled(fed, [FED], [0]) == [11]


def test_returns_nobody_asks_for_do_not_pile_up():
    fed, log = make_fed(1, depth=2), []
    for number in range(5):
        owe(fed, number, [0], Return(log, number))
    assert log == [0, 1, 2]


def test_tokens_beside_drafts_are_not_fed():
    fed, log = make_fed(3, depth=9), []
    owe(fed, 0, [0, 1, 2], Return(log, 10, 11, 12))
    owe(fed, 1, [0, 1, 1, 1], Return(log, 20, 21, 22, 23), feeds=[True, False, False, False])
    assert filled(fed, [FED, FED], [0, 2]) == [20, 12]
    with pytest.raises(AssertionError):
        filled(fed, [FED], [1])


def test_a_token_that_was_never_sampled_is_our_own_bug():
    with pytest.raises(AssertionError):
        filled(make_fed(1, depth=2), [FED], [0])
