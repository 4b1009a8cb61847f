"""Steps out of order: held, released by number, and every deviation named."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trireme.core.step import Step, first_checksum, ints, pack_step, peek_step
from trireme.ranks.order import Misorder, StepOrder


def chain(epoch: int, num: int) -> list[bytes]:
    packed, checksum = [], first_checksum(epoch)
    for number in range(num):
        one = ints([number])
        data, checksum = pack_step(Step(epoch, number, one, ints([0]), ints([1]), ints([1]), one), checksum)
        packed.append(data)
    return packed


def feed(order: StepOrder, packed: bytes, now: float = 0.0) -> list[int]:
    step = peek_step(packed)
    order.hold(step, packed, step.number, now)
    return list(itertools.takewhile(lambda number: number is not None, iter(order.release, "never")))


def fault(order: StepOrder, packed: bytes) -> Misorder:
    with pytest.raises(Misorder) as caught:
        feed(order, packed)
    return caught.value


def ready(window: int = 4, epoch: int = 1) -> StepOrder:
    order = StepOrder(0, window)
    order.begin(epoch)
    return order


def test_picture_of_the_docstring():
    order, packed = ready(), chain(1, 7)
    for early in packed[:4]:
        feed(order, early)
    assert [feed(order, packed[number]) for number in (4, 6, 5)] == [[4], [], [5, 6]]
    assert order.reordered == 1


@given(st.permutations(range(6)))
def test_any_order_within_the_window_is_put_right(arrival):
    order, packed = ready(window=6), chain(1, 6)
    assert [number for one in arrival for number in feed(order, packed[one])] == list(range(6))


def test_duplicates_are_named_released_or_held():
    order, packed = ready(), chain(1, 3)
    feed(order, packed[0])
    assert fault(order, packed[0]).kind == "duplicate"
    feed(order, packed[2])
    assert fault(order, packed[2]).kind == "duplicate"


def test_another_epoch_is_stale_and_harms_nobody():
    order, packed = ready(epoch=2), chain(2, 1)
    stale = fault(order, chain(1, 1)[0])
    assert (stale.kind, stale.ends_epoch) == ("stale", False)
    assert feed(order, packed[0]) == [0]


def test_nothing_passes_before_a_first_epoch_or_after_an_end():
    order, packed = StepOrder(0, 4), chain(-1, 1)
    assert fault(order, packed[0]).kind == "stale"
    order, packed = ready(), chain(1, 3)
    feed(order, packed[2])
    assert order.end("a test") == [2]
    assert "a test" in fault(order, packed[0]).message


def test_a_changed_byte_is_caught_here_and_downstream():
    order, packed = ready(), chain(1, 2)
    changed = bytearray(packed[0])
    changed[changed.rindex(ints([1]))] ^= 2  # how many rows are sampled
    assert fault(order, bytes(changed)).kind == "checksum"
    order = ready()
    other = pack_step(Step(1, 0, ints([5]), ints([0]), ints([1]), ints([1]), ints([9])), first_checksum(1))[0]
    feed(order, other)
    assert fault(order, packed[1]).kind == "checksum"


def test_gaps_by_window_and_by_time():
    order, packed = ready(window=2), chain(1, 4)
    assert fault(order, packed[2]).kind == "gap"
    feed(order, packed[1], now=10.0)
    order.check_gap(now=14.0, limit_s=5.0)
    with pytest.raises(Misorder, match="step 0 of epoch 1 is missing"):
        order.check_gap(now=16.0, limit_s=5.0)
