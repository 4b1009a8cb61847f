"""Sizes that are captured, what memory is dealt out to, and a clear word where it holds no page."""

from types import SimpleNamespace

import pytest
import torch

from trireme.core.control import Join
from trireme.core.refusal import Refusal
from trireme.core.settings import make_settings
from trireme.layers.block import PerRequest, PerToken
from trireme.ranks import duty, memory
from trireme.ranks.graphs import buckets
from trireme.ranks.memory import Room, Sizes, check_states, find_room, num_pages, num_snapshots, stock, unstock


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (6, [1, 2, 4, 6]), (32, [1, 2, 4, 8, 16, 24, 32]), (70, [1, 2, 4, 8, 16, 24, 32, 48, 64, 70])]
)
def test_buckets_end_at_the_most_sequences(most: int, sizes: list[int]):
    assert buckets(most) == sizes


TOKENS = PerToken(2, 10, torch.float16)
STATES = PerRequest(window=3, channels=20, num_heads=2, key_dim=4, value_dim=5, held=24, dtype=torch.float16)
CPU = torch.device("cpu")


def never() -> None:
    raise AssertionError


def room_of(sizes: Sizes, **values) -> Room:
    return find_room(make_settings({"model": "m", **values}), CPU, sizes, largest=never, decode=never, num_graphs=0, mailbox_bytes=0)


def test_sizes_are_those_of_what_is_allocated():
    num_slots, num_snapshots, num_held = 5, 3, 4
    sizes = Sizes.of([TOKENS, STATES, STATES], num_held)
    assert sizes.page == sum(pool.nbytes for pool in TOKENS.allocate(1, CPU))
    pools = STATES.allocate(num_slots, num_snapshots, num_held, CPU)
    assert num_slots * sizes.slot + num_snapshots * sizes.snapshot == 2 * sum(pool.nbytes for pool in pools)
    assert pools[1].dtype == torch.float32  # whatever the model's


def test_a_cpu_measures_nothing():
    room = room_of(Sizes(30, 0, 0), kv_cache_memory_bytes=100)
    assert room == Room(100)
    assert num_pages(room, Sizes(30, 0, 0), make_settings({"model": "m"}), 0) == 3
    assert num_snapshots(room, Sizes(30, 0, 0)) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 6),
        ({"state_cache_memory_bytes": 3005}, 3),
        ({"state_cache_memory_bytes": 0}, 0),
        ({"state_cache_memory_bytes": 50_000}, 50),
        ({"enable_prefix_caching": False}, 0),
    ],
)
def test_snapshots_are_as_many_as_slots_or_as_said(values, expected: int):
    sizes = Sizes(page=30, slot=1200, snapshot=1000)
    room = room_of(sizes, max_num_seqs=6, **values)
    assert (room.states, num_snapshots(room, sizes)) == (7200, expected)


def test_snapshots_are_fewer_than_slots_where_memory_is_short():
    sizes = Sizes(page=30, slot=1 << 28, snapshot=1 << 28)
    assert num_snapshots(room_of(sizes, max_num_seqs=64), sizes) == 4


GIB = 1 << 30


@pytest.fixture
def gpu(monkeypatch) -> torch.device:
    """100 GiB: 40 of weights, 8 of states, and what steps need."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 48 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * GIB, 100 * GIB))
    monkeypatch.setattr(memory, "_peak", lambda compute, device: 4 * GIB)
    return torch.device("cuda")


@pytest.mark.parametrize(
    ("values", "snapshots", "pages"),
    [
        ({}, 8, 28),  # as many as slots
        ({"max_num_seqs": 16}, 9, 27),  # a quarter of what is left
        ({"state_cache_memory_bytes": 20 * GIB}, 20, 16),
        ({"kv_cache_memory_bytes": 5 * GIB}, 8, 5),
        ({"enable_prefix_caching": False}, 0, 36),
    ],
)
def test_what_a_gpu_has_left_is_snapshots_and_pages(gpu, values, snapshots: int, pages: int):
    settings = make_settings({"model": "m", "max_num_seqs": 8, **values})
    room = find_room(settings, gpu, Sizes(GIB, GIB, GIB), largest=never, decode=never, num_graphs=0, mailbox_bytes=0)
    assert room.weights == (48 - settings.max_num_seqs) * GIB
    assert (room.snapshots // GIB, num_pages(room, Sizes(GIB, GIB, GIB), settings, 0)) == (snapshots, pages)
    assert f"states {settings.max_num_seqs}.00 GiB" in str(room)


def test_states_that_a_gpu_cannot_hold_are_refused(gpu):
    sizes = Sizes(GIB, GIB, GIB)
    check_states(make_settings({"model": "m", "max_num_seqs": 50}), gpu, sizes, 1)
    with pytest.raises(Refusal, match=r"stage_1 has no room for the states of 51 sequences.*lower max_num_seqs"):
        check_states(make_settings({"model": "m", "max_num_seqs": 51}), gpu, sizes, 1)


def test_a_stage_that_keeps_no_pages_is_never_the_one_with_the_fewest():
    sizes = Sizes(page=0, slot=1200, snapshot=1000)
    assert num_pages(room_of(sizes), sizes, make_settings({"model": "m"}), 0) >= 1 << 24
    assert num_pages(room_of(sizes), sizes, make_settings({"model": "m", "num_pages": 9}), 0) == 9


def test_no_room_says_what_took_it():
    room = Room(pages=-5, total=1 << 30, weights=1 << 29)
    with pytest.raises(
        Refusal, match=r"stage_1 has no room for keys and values: of 1.00 GiB: weights 0.50 GiB.*raise gpu_memory_utilization"
    ):
        num_pages(room, Sizes(30, 0, 0), make_settings({"model": "m"}), 1)


@pytest.mark.gpu
def test_steps_that_grow_take_no_memory_anew():
    """Each step's tensors are a little larger than any before; they are cut of what was taken once."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device, mib = torch.device("cuda"), 1 << 20
    torch.cuda.empty_cache()
    stock(Room(0, total=GIB, activations=256 * mib), 64 * mib, device)
    taken = torch.cuda.memory_stats(device)["num_device_alloc"]
    for step in range(1, 20):
        rows = torch.empty(24 * mib + step * 100_000, dtype=torch.uint8, device=device)
        wide = torch.empty(8 * rows.numel(), dtype=torch.uint8, device=device)
        del rows, wide
    assert torch.cuda.memory_stats(device)["num_device_alloc"] == taken


@pytest.mark.gpu
def test_what_an_epoch_keeps_is_not_cut_out_of_what_steps_compute_in():
    """Of three epochs with boxes of 8 MiB, which a rank that was killed never counted off."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device, mib, boxes, reserved = torch.device("cuda"), 1 << 20, [], []
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    for _ in range(3):
        unstock(device)
        boxes.append(torch.zeros(8 * mib, dtype=torch.uint8, device=device))
        stock(Room(0, total=GIB, activations=256 * mib), 64 * mib, device)
        reserved.append(torch.cuda.memory_reserved(device) - before)
    assert reserved[-1] <= (256 + 128 + 64 + 3 * 20) * mib, "one block, and a small one for each box"


def test_an_epoch_begins_with_room_for_its_groups(monkeypatch):
    done = []
    runner = SimpleNamespace(
        collectives=None,
        hidden=8,
        dtype=torch.float32,
        map_version=0,
        leave=lambda: done.append("leave"),
        settle_maps=lambda version: None,
        make_way=lambda: done.append("make way"),
        begin=lambda link, *give_up: done.append(f"begin {link}"),
        find_sp_from=lambda give_up: None,
    )
    monkeypatch.setattr(duty, "form_link", lambda *args, **named: done.append("form") or "link")
    brief = SimpleNamespace(settings=make_settings({"model": "m"}), stage=0, rank=0)
    duty.Duty(brief, SimpleNamespace(waiting=lambda: False, broken=lambda: False), runner)._join(Join(1, "store"))
    assert done == ["leave", "make way", "form", "begin link"]


def test_no_more_is_stocked_than_is_free(monkeypatch):
    """Where pages were given all there is, steps take what they need as it comes."""
    made: list[int] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 100 * GIB))
    monkeypatch.setattr(torch, "empty", lambda num_bytes, **_: made.append(num_bytes))
    for activations in (4, 8):
        stock(Room(0, total=100 * GIB, activations=activations * GIB), 1 * GIB, torch.device("cuda"))
    stock(Room(0), GIB, CPU)
    assert made == [7 * GIB]
