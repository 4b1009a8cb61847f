#!/usr/bin/env -S python3 -P
"""A rank that computes nothing and takes as long as one H100 with Qwen3-8B would: how fast everything else is shows on any machine.

    TRIREME_PYTHON=tools/trireme_tools/timed_rank.py trireme bench --offline --model tools/measurements/empty_model ...

It stands in for the interpreter of ranks (`-m trireme.ranks.worker BRIEF`). Steps are launched one by one, queue on the "device", and are
answered when it is done. TIMED_STEP_S: every step takes so long. TIMED_LOG: a file for one line a step: number, rows, samples, and in
milliseconds what it took, how long the device had nothing to do before it, and how late the answer left.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time

import numpy as np

from trireme.core.control import Found, Founded, Join, Joined, Parcel, open_message, pack_answer
from trireme.core.step import Clock, Outcome, Step, array, peek_step
from trireme.ranks.channel import BREAK, Beat, RankChannel
from trireme.ranks.launch import Brief
from trireme.ranks.worker import Heart, main

_LAUNCH_S = 0.0015  # of the host
_NUM_PAGES = 23341


def step_s(step: Step) -> float:
    """Weights, then 12 us a decode, keys and values at 2.9 TB/s, and 23 us a prompt row (2026-11-22-h100.md)."""
    starts, counts = array(step.starts).astype(np.float64), array(step.counts)
    decodes = counts == 1
    read_bytes = (starts + counts)[decodes].sum() * 147456
    return float(5.9e-3 + 12e-6 * decodes.sum() + read_bytes / 2.9e12 + 23e-6 * counts[~decodes].sum())


def serve(brief: Brief, channel: RankChannel, heart: Heart) -> None:
    fixed = float(os.environ.get("TIMED_STEP_S", 0))
    launched: queue.SimpleQueue[tuple[int, Step, float]] = queue.SimpleQueue()
    rng = np.random.default_rng(0)

    def device() -> None:
        free = time.perf_counter()
        with open(os.environ.get("TIMED_LOG", os.devnull), "w", buffering=1) as log:
            while True:
                ticket, step, at = launched.get()
                busy, idle = fixed or step_s(step), max(0.0, at - free)
                free = max(free, at) + busy
                time.sleep(max(0.0, free - time.perf_counter()))
                tokens = rng.integers(3, 50, step.num_samples, dtype=np.int32).tobytes()
                outcome = Outcome(step.epoch, step.number, brief.stage, tokens, clock=Clock(time.time() - busy, idle, 0.0, busy))
                late = time.perf_counter() - free
                channel.answer(ticket, Parcel(pack_answer(outcome)), fault=False)
                print(step.number, step.num_rows, step.num_samples, *(f"{s * 1e3:.3f}" for s in (busy, idle, late)), file=log)

    threading.Thread(target=device, daemon=True).start()
    heart.tell(Beat("ready", num_pages=_NUM_PAGES))
    while True:
        ticket, parcel = channel.receive()
        if ticket == BREAK:
            continue
        message = open_message(parcel.packed)
        if isinstance(message, Found):
            channel.answer(ticket, Parcel(pack_answer(Founded(message.epoch, "nowhere:1"))), fault=False)
        elif isinstance(message, Join):
            channel.answer(ticket, Parcel(pack_answer(Joined(message.epoch))), fault=False)
        elif isinstance(message, memoryview):
            step = peek_step(bytes(message))
            time.sleep(_LAUNCH_S)
            launched.put((ticket, step, time.perf_counter()))


if __name__ == "__main__":
    del sys.argv[1:3]  # -m trireme.ranks.worker
    main(serve)
