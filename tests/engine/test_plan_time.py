"""How long planning and learning take with many sequences: printed (`pytest -s`), not asserted."""

from __future__ import annotations

import time

import pytest

from trireme.core.request import Request, Sampling
from trireme.core.settings import Limits
from trireme.core.step import Outcome, ints, pack_step
from trireme.engine.scheduler import Scheduler


@pytest.mark.parametrize("num_stages, inflight", [(1, 1), (1, 2), (2, 3)])
def test_plan_time(num_stages, inflight, num_seqs=256, num_steps=200):
    limits = Limits(
        max_model_len=2048,
        num_pages=20_000,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=2048,
        num_stages=num_stages,
        inflight=inflight,
    )
    scheduler = Scheduler(limits)
    for i in range(num_seqs):
        sampling = Sampling(max_tokens=1000, stop_token_ids=(1,))
        scheduler.add(Request(id=str(i), prompt=list(range(i, i + 100)), sampling=sampling))
    spent = {"plan": 0.0, "pack": 0.0, "learn": 0.0}
    flying, counted, items = [], 0, 0
    while counted < num_steps:
        while True:
            began = time.perf_counter()
            step = scheduler.next()
            planned = time.perf_counter()
            if step is None:
                break
            pack_step(step, 0)
            packed = time.perf_counter()
            flying.append(step)
            if not len(scheduler._waiting) and not scheduler._prompts:
                spent["plan"] += planned - began
                spent["pack"] += packed - planned
                counted += 1
                items += step.num_items
        step = flying.pop(0)
        outcome = Outcome(step.epoch, step.number, 0, ints([7] * step.num_samples))
        began = time.perf_counter()
        scheduler.learn(outcome)
        if counted:
            spent["learn"] += time.perf_counter() - began
    each = ", ".join(f"{name} {seconds / counted * 1e6:.0f} us" for name, seconds in spent.items())
    print(f"\n{num_seqs} sequences, {num_stages} stages, {inflight} in flight, {items / counted:.0f} items a step: {each}")
