"""A rank's end of its sockets: an epoch's end is seen behind the orders before it, which are kept."""

from __future__ import annotations

import time
from pathlib import Path

import zmq

from trireme.core.control import Parcel
from trireme.ranks.channel import BREAK, OrderSocket, RankChannel, socket_paths


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_epochs_end_is_seen_behind_orders(tmp_path: Path):
    context = zmq.Context()
    orders = OrderSocket(context, *socket_paths(tmp_path, 0, 0, 1))
    channel = RankChannel(tmp_path, 0, 0, 1)
    try:
        until(lambda: orders.send(1, Parcel(b"one")))
        until(channel.waiting)
        assert not channel.broken() and channel.waiting()
        for ticket in (2, BREAK, 3):
            orders.send(ticket, Parcel(b""))
        until(channel.broken)
        assert [channel.receive().ticket for _ in range(4)] == [1, 2, BREAK, 3]
        assert not channel.waiting() and not channel.broken()
    finally:
        channel.close()
        orders.close()
        context.term()
