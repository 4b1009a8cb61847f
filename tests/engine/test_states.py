"""Snapshots: found by the prefix they stand for, the least recently used given away."""

from trireme.engine.states import Snapshots


def test_the_least_recently_used_goes_first():
    snapshots = Snapshots(2)
    assert (snapshots.take(b"a"), snapshots.take(b"b"), snapshots.num_used) == (0, 1, 2)
    assert snapshots.find(b"a") == 0
    assert snapshots.take(b"c") == 1
    assert [snapshots.find(name) for name in (b"a", b"b", b"c")] == [0, None, 1] and snapshots.num_used == 2


def test_a_prefix_is_rounded_down_to_its_longest_snapshot():
    snapshots = Snapshots(4)
    second, first, other = (snapshots.take(name) for name in (b"p2", b"p1", b"q4"))
    assert snapshots.longest([b"p1", b"p2", b"p3"]) == (2, second)
    assert snapshots.longest([b"p1", b"x2"]) == (1, first)
    assert snapshots.longest([b"x1", b"x2"]) == snapshots.longest([]) == (0, -1)
    assert snapshots.take(b"r") not in (first, second, other)
    assert snapshots.take(b"s") == other, "what was not asked for is the least recently used"
