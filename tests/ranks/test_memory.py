"""Sizes that are captured, and a clear word where memory holds no page."""

import pytest
import torch

from trireme.core.refusal import Refusal
from trireme.core.settings import make_settings
from trireme.ranks.graphs import buckets
from trireme.ranks.memory import Room, find_room, num_pages


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (6, [1, 2, 4, 6]), (32, [1, 2, 4, 8, 16, 24, 32]), (70, [1, 2, 4, 8, 16, 24, 32, 48, 64, 70])]
)
def test_buckets_end_at_the_most_sequences(most: int, sizes: list[int]):
    assert buckets(most) == sizes


def test_a_cpu_measures_nothing():
    def never() -> None:
        raise AssertionError

    cpu = torch.device("cpu")
    room = find_room(make_settings({"model": "m", "kv_cache_memory_bytes": 100}), cpu, largest=never, decode=never, num_graphs=0)
    assert room == Room(100)
    assert num_pages(room, 30, make_settings({"model": "m"}), 0) == 3


def test_no_room_says_what_took_it():
    room = Room(pages=-5, total=1 << 30, weights=1 << 29)
    with pytest.raises(
        Refusal, match=r"stage_1 has no room for keys and values: of 1.00 GiB: weights 0.50 GiB.*raise gpu_memory_utilization"
    ):
        num_pages(room, 30, make_settings({"model": "m"}), 1)
