"""`trireme bench --ops`: every op on the shapes of real models, beside what this machine can copy and multiply.

Shapes, inputs and the least work of each come from the ops' cases.py. On a GPU calls are replayed from a CUDA graph, so that
what is timed is the device; inputs are several copies in turn, so that none is in the cache because it was just used.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import trireme_kernels
from trireme.core.refusal import Refusal
from trireme_kernels.case import Case, Work
from trireme_kernels.choose import build, implementations, misfit

_IN_TURN_BYTES = 256 << 20  # of input copies: several times a GPU's second-level cache
_MOST_COPIES = 32
_LONGEST_S = 0.5  # of one call


@dataclass(frozen=True)
class Ceiling:
    """What this machine was seen to do, in the same run."""

    bytes_per_s: float  # the faster of two large copies, one by the driver, one by a kernel: bytes read and bytes written
    flops: float  # a large bfloat16 product


@dataclass(frozen=True)
class Timing:
    """One op, implementation and case."""

    op: str
    implementation: str
    sizes: str
    seconds: float
    bytes_per_s: float
    flops: float
    share: float  # of the ceiling that binds: 1 is as fast as this machine can move or multiply so much


def bench_ops(op: str | None, as_json: bool) -> None:
    """Times one op, or all of them, and prints a table or JSON."""
    ops = sorted(path.parent.name for path in Path(trireme_kernels.__file__).parent.glob("*/op.py"))
    if op is not None and op not in ops:
        raise Refusal(f"there is no op {op}", why=f"the ops are {', '.join(ops)}", fix="name one of them")
    clock = _GpuClock() if torch.cuda.is_available() else _CpuClock()
    with torch.inference_mode():
        ceiling = _ceiling(clock)
        timings = [timing for name in ([op] if op else ops) for timing in _timings(name, clock, ceiling)]
    if as_json:
        print(json.dumps({"machine": clock.name, "ceiling": asdict(ceiling), "ops": [asdict(timing) for timing in timings]}, indent=2))
    else:
        _show(Console(), clock.name, ceiling, timings)


class _CpuClock:
    device, repeats, copies_bytes = "cpu", 3, 0
    name = f"CPU, {torch.get_num_threads()} threads"

    def seconds(self, calls: list[Callable[[], Any]]) -> float:
        """Median time of a call, over calls in turn."""
        calls[0]()
        spent = []
        for call in calls * self.repeats:
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
        return statistics.median(spent)


class _GpuClock:
    device, repeats, copies_bytes = "cuda", 10, _IN_TURN_BYTES

    def __init__(self):
        self.name = torch.cuda.get_device_name()

    def seconds(self, calls: list[Callable[[], Any]]) -> float:
        """Time of a call in a graph of at least 8, the median of several replays."""
        calls = calls * -(-8 // len(calls))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:
                call()  # compiles, and picks what is picked at a first call
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        spent = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            spent.append(start.elapsed_time(end) * 1e-3 / len(calls))
        return statistics.median(spent)


def _ceiling(clock: _CpuClock | _GpuClock) -> Ceiling:
    on_gpu = clock.device == "cuda"
    numbers = torch.ones((1 << 28) if on_gpu else (1 << 24), device=clock.device)
    target, side = torch.empty_like(numbers), 8192 if on_gpu else 1024
    copies = (lambda: target.copy_(numbers)), (lambda: torch.neg(numbers, out=target))
    matrix = torch.randn(side, side, device=clock.device).bfloat16()  # a product of zeros would be faster than of numbers
    return Ceiling(
        bytes_per_s=2 * numbers.nbytes / min(clock.seconds([copy]) for copy in copies),
        flops=2 * side**3 / clock.seconds([lambda: matrix @ matrix]),
    )


def _timings(op: str, clock: _CpuClock | _GpuClock, ceiling: Ceiling) -> Iterator[Timing]:
    cases = import_module(f"trireme_kernels.{op}.cases")
    for case in cases.BENCH:
        here = replace(case, device=clock.device)
        names = [name for name in implementations(op) if misfit(op, name, here) is None]
        first = cases.inputs(here, 0)
        work: Work = cases.work(first)
        least = max(work.moved_bytes / ceiling.bytes_per_s, work.flops / ceiling.flops)
        if least > _LONGEST_S:
            continue  # a CPU is not asked what only a GPU can answer
        copies = max(1, min(_MOST_COPIES, clock.copies_bytes // max(1, work.moved_bytes)))
        copied = [first, *(cases.inputs(here, seed) for seed in range(1, copies))]
        # the reference, the last, only where there is nothing else, or where it is the peer
        for name in names if getattr(cases, "PEER", None) == names[-1] else names[:-1] or names:
            seconds = clock.seconds([cases.timed(build(op, name, here), inputs) for inputs in copied])
            yield Timing(op, name, _sizes(case), seconds, work.moved_bytes / seconds, work.flops / seconds, least / seconds)


def _sizes(case: Case) -> str:
    return " ".join(f"{name}={size}" for name, size in case.sizes.items())


def _show(console: Console, machine: str, ceiling: Ceiling, timings: list[Timing]) -> None:
    unit, letter = (1e12, "T") if ceiling.bytes_per_s > 1e12 else (1e9, "G")
    title = f"{machine}: copies {ceiling.bytes_per_s / unit:.2f} {letter}B/s, multiplies {ceiling.flops / unit:.0f} {letter}FLOP/s"
    table = Table("op", "by", "sizes", title=title)
    for column in ("us", f"{letter}B/s", f"{letter}FLOP/s", "of the ceiling"):
        table.add_column(column, justify="right")
    for one in timings:
        rate = f"{one.flops / unit:.1f}" if one.flops else ""
        table.add_row(
            one.op, one.implementation, one.sizes, f"{one.seconds * 1e6:.1f}", f"{one.bytes_per_s / unit:.2f}", rate, f"{one.share:.0%}"
        )
    console.print(table)
