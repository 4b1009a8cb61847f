"""Aside: what a GPU does beside the products that it computes: collectives, and the little that stands between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Done:
    """What was computed aside, once it is waited for: at once where it was not."""

    _event: torch.cuda.Event | None = None

    def mark(self, stream: torch.cuda.Stream) -> None:
        """All that the stream was given so far belongs to it."""
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def wait(self) -> None:
        """What is computed from here on finds it."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class Aside:
    """A stream beside the one that computes, and ahead of it where both want the device; on a CPU nothing is beside anything. A rank
    has one, since memory that a stream has freed is kept for that stream. While anything is aside the other stream has no
    collective, so that all of a GPU's are made one after another, in one order on all ranks."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[Done]:
        """What is computed inside follows all that was computed before, and goes on beside what is computed after it. What it reads
        must be kept until it is waited for, or its memory would be given away meanwhile."""
        done = Done()
        if self._stream is None:
            yield done
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield done
            done.mark(self._stream)
