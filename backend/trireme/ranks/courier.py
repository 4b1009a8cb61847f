"""Courier: carries what a stage's experts were given to the service that balances them, and its offers back, in a thread, so that
neither the stage nor its leader waits for the service. Without it the stage keeps the maps that it has."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from trireme.core.control import Offer, Push
from trireme.core.log import logger

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

    def _run(self, deliver: Callable[[Offer], None]) -> None:
        answers = True  # whether the service did when it was last asked
        while (push := self._pushes.get()) is not None:
            try:
                offer = self._ask(push)
            except Exception as error:
                if answers:
                    self._log.warning("loads of experts reach nobody, maps stay as they are: %s", error)
                answers = False
                continue
            answers = True
            if offer.version:
                deliver(offer)
