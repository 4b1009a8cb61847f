"""Courier: carries what a stage's experts were given to the service that balances them, and its offers back, in a thread, so that
neither the stage nor its leader waits for the service. Without it the stage keeps the maps that it has."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import msgspec

from trireme.core.control import Offer, Push
from trireme.core.log import logger
from trireme.core.step import array, ints
from trireme.core.told import MOST_PUSHED_BYTES, ToldRows

_STOP_S = 5.0  # for a question that is on its way


class Courier:
    """`ask`: the service, which may take its time or raise."""

    def __init__(self, name: str, ask: Callable[[Push], Offer]):
        self._ask, self._log = ask, logger(name)
        self._pushes: queue.SimpleQueue[Push | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._name = f"{name} loads"

    def start(self, deliver: Callable[[Offer], None]) -> None:
        """`deliver` is a leader's `prepare`."""
        self._thread = threading.Thread(target=self._run, args=(deliver,), name=self._name, daemon=True)
        self._thread.start()

    def push(self, push: Push) -> None:
        """Returns at once; from any thread."""
        self._pushes.put(push)

    def stop(self) -> None:
        self._pushes.put(None)
        if self._thread is not None:
            self._thread.join(_STOP_S)

    def _take(self) -> Push | None:
        """All pushes that wait, as one: a slow service gets them less often and a dead one leaves none behind. None: the end."""
        push = self._pushes.get()
        while push is not None and not self._pushes.empty():
            then = self._pushes.get()
            if then is None:
                self._pushes.put(None)
                break
            push = together(push, then)
        return push

    def _run(self, deliver: Callable[[Offer], None]) -> None:
        answers = True  # whether the service did when it was last asked
        records = False  # whether it wants the experts of every row
        while (push := self._take()) is not None:
            try:
                offer = self._ask(push)
            except Exception as error:
                if answers:
                    self._log.warning("loads of experts reach nobody, maps stay as they are: %s", error)
                answers, offer = False, Offer()
            else:
                answers = True
            if offer.version or offer.records != records:
                records = offer.records
                deliver(offer)


def together(first: Push, then: Push) -> Push:
    """Two pushes of a stage as one, which is of the maps that the stage had last."""
    told = ToldRows(MOST_PUSHED_BYTES)
    for push in (first, then):
        told.add(push.rows, push.experts, push.left_out)
    rows, experts, left_out = told.take()
    return msgspec.structs.replace(
        then,
        loads=ints(array(first.loads) + array(then.loads)),
        num_steps=first.num_steps + then.num_steps,
        moved_bytes=first.moved_bytes + then.moved_bytes,
        stalled_s=first.stalled_s + then.stalled_s,
        fault=then.fault or first.fault,
        rows=rows,
        experts=experts,
        left_out=left_out,
    )
