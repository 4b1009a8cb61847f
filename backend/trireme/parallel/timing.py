"""Timing: how long a device takes for what the ranks of a group do together, without the host that calls it."""

from __future__ import annotations

from collections.abc import Callable

import torch

_WARM_UPS, _PASSES = 3, 10
_AHEAD_CYCLES = 20_000_000  # that the device sleeps, so that it does not wait for the host in between: 10 ms of an H100


def device_seconds(run: Callable[[], object], wait: Callable[[torch.cuda.Event], None], *, num_rounds: int) -> float:
    """Of the current device, for one run: the best of some rounds. All ranks that `run` needs call this together; `wait` blocks until
    the device has come to an event, or raises where it never will."""
    for _ in range(_WARM_UPS):
        run()  # what is compiled or made ready at its first use
    found = []
    for _ in range(num_rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_AHEAD_CYCLES)
        run()  # after which all ranks are equally far
        begin.record()
        for _ in range(_PASSES):
            run()
        end.record()
        wait(end)
        found.append(begin.elapsed_time(end) / 1e3 / _PASSES)
    return min(found)
