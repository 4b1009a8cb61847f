"""Offline: the engine, its ranks and links in this process' care, without a server. Used by `generate`, `bench --offline` and `trace`."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import msgspec
from rich.console import Console

from trireme.core.garbage import settle, unsettle
from trireme.core.refusal import Refusal
from trireme.core.request import Emission, Request, Sampling
from trireme.core.settings import Settings
from trireme.engine.engine import Engine
from trireme.models.spec import read_spec
from trireme.ranks.launch import Launcher
from trireme.ranks.local import LocalStages
from trireme.serve.balancing import Balancing, first_maps
from trireme.serve.place import run_folder
from trireme_tools.load import Record
from trireme_tools.profiler import PREFILL, Profiler, Window, decodes
from trireme_tools.workload import Ask, make_workload


@contextlib.contextmanager
def running(settings: Settings, launcher: Launcher | None = None) -> Iterator[Engine]:
    """An engine whose stages are ready. Refusal where they do not get ready. Nothing is left at the end but what `launcher` keeps."""
    os.environ.setdefault("TRIREME_LOG", "WARNING")  # of this process and the ranks: the verbs say themselves what there is to say
    spec = read_spec(Path(settings.model))
    max_model_len = settings.max_model_len or spec.max_position_embeddings
    num_drafts = settings.mtp.num_drafts(spec.num_mtp_layers)
    balancing = Balancing(settings) if settings.eplb is not None else None
    service, maps = (balancing.push, first_maps(settings, spec)) if balancing is not None else (None, None)
    stages = LocalStages(settings, run_folder(os.getpid()), launcher, service=service, maps=maps)
    engine = Engine(settings, max_model_len=max_model_len, stages=stages, num_drafts=num_drafts)
    stages.start()
    engine.start()
    try:
        with Console(stderr=True).status(f"starting {settings.num_stages} stage(s) of {Path(settings.model).name}"):
            engine.wait_ready(settings.start_timeout_s)
        settle()
        yield engine
    finally:
        unsettle()
        engine.stop()
        stages.stop()
        if balancing is not None:
            balancing.save()


def generate(settings: Settings, requests: Sequence[Request]) -> list[list[int]]:
    """Output tokens of each request, in their order. An error of any is raised."""
    settings = msgspec.structs.replace(settings, max_queue_size=max(settings.max_queue_size, len(requests)))
    outputs: dict[str, list[int]] = {request.id: [] for request in requests}
    errors: list[Exception] = []
    done = threading.Semaphore(0)

    def listen(emission: Emission) -> None:
        outputs[emission.request_id] += emission.tokens
        if emission.finish_reason is not None:
            errors.extend([emission.error] if emission.error else [])
            done.release()

    with running(settings) as engine:
        for request in requests:
            engine.submit(request, listen)
        for _ in requests:
            done.acquire()
    if errors:
        raise errors[0]
    return [outputs[request.id] for request in requests]


class Measured(NamedTuple):
    records: list[Record]
    seconds: float  # in all
    acceptance_length: float | None  # mean tokens for each time that drafts of a sequence were verified; None where none were


def measure(
    settings: Settings,
    workload: Sequence[Ask],
    concurrency: int,
    progress: Callable[[int], None],
    profiler: Profiler | None = None,
    windows: Mapping[str, Window] = MappingProxyType({}),
) -> Measured:
    """At most `concurrency` requests at once, after a short request that is not counted. `windows` are recorded meanwhile."""
    settings = msgspec.structs.replace(settings, max_queue_size=max(settings.max_queue_size, len(workload)))
    with running(settings, profiler) as engine:
        _drive(engine, [Ask((3, 4, 5, 6), 8)], 1, lambda count: None)
        verified, accepted = engine.stats.verifications, engine.stats.accepted_tokens
        with profiler.recording(windows) if profiler is not None else contextlib.nullcontext():
            records, seconds = _drive(engine, workload, concurrency, progress)
        verified, accepted = engine.stats.verifications - verified, engine.stats.accepted_tokens - accepted
        return Measured(records, seconds, 1.0 + accepted / verified if verified else None)


class DecodeStep(NamedTuple):
    """What many equal sequences at once take."""

    batch: int
    first_s: float  # for one token of each
    step_ms: float  # for each token after that


def measure_decode(
    settings: Settings, batches: Sequence[int], input_len: int, output_len: int, vocab_size: int, profiler: Profiler | None = None
) -> list[DecodeStep]:
    """A decode step is (seconds of output_len tokens - seconds of one) / (output_len - 1), in milliseconds. `profiler` records some
    in the middle of one more run."""
    settings = msgspec.structs.replace(settings, max_queue_size=max(settings.max_queue_size, *batches))
    with running(settings, profiler) as engine:

        def seconds(batch: int, outputs: int) -> float:
            return _drive(engine, make_workload(batch, str(input_len), str(outputs), vocab_size, outputs), batch, lambda count: None)[1]

        for batch in batches:  # what is compiled at its first use
            seconds(batch, 8)
        times = [(batch, seconds(batch, 1), seconds(batch, output_len)) for batch in batches]
        if profiler is not None:
            for batch in batches:
                with profiler.recording({f"decode of {batch}": decodes(output_len)}):
                    seconds(batch, output_len)
    return [DecodeStep(batch, first_s, (all_s - first_s) / (output_len - 1) * 1e3) for batch, first_s, all_s in times]


class Prefill(NamedTuple):
    """What so many prompts of one length, sent at once, take until each has its first token."""

    prompts: int
    input_len: int
    seconds: float  # the median of all runs
    runs: list[float]

    @property
    def tokens_per_s(self) -> float:
        return self.prompts * self.input_len / self.seconds


def measure_prefill(
    settings: Settings, shapes: Sequence[tuple[int, int]], repeats: int, vocab_size: int, profiler: Profiler | None = None
) -> tuple[list[Prefill], list[int]]:
    """`shapes`: (prompts, tokens of each). Each is measured `repeats` times, on other prompts, after one run that does not count.
    Also the activation_bytes of each stage. `profiler` records one run more."""
    settings = msgspec.structs.replace(settings, max_queue_size=max(settings.max_queue_size, *(prompts for prompts, _ in shapes)))
    measured = []
    with running(settings, profiler) as engine:

        def run(prompts: int, input_len: int, seed: int) -> list[Record]:
            return _drive(engine, make_workload(prompts, str(input_len), "1", vocab_size, seed), prompts, lambda count: None)[0]

        for prompts, input_len in shapes:
            runs = []
            for seed in range(1 + repeats):
                records = run(prompts, input_len, seed)
                if errors := [record.error for record in records if record.error]:
                    raise Refusal(f"a prompt of {input_len} tokens failed", why=errors[0], fix="give --max-model-len room for it")
                runs.append(max(record.arrivals[0] for record in records) - records[0].sent)
            measured.append(Prefill(prompts, input_len, statistics.median(runs[1:]), runs[1:]))
        if profiler is not None:
            for prompts, input_len in shapes:
                with profiler.recording({f"prefill of {prompts} x {input_len}": PREFILL}):
                    run(prompts, input_len, 1 + repeats)
        return measured, [state.activation_bytes for state in engine.state()[1] if state is not None]


def _drive(engine: Engine, workload: Sequence[Ask], concurrency: int, progress: Callable[[int], None]) -> tuple[list[Record], float]:
    began, gate = time.perf_counter(), threading.Semaphore(concurrency)
    records = {}

    def listen(emission: Emission) -> None:
        record = records[emission.request_id]
        record.arrivals += [time.perf_counter() - began] * len(emission.tokens)
        if emission.finish_reason is not None:
            record.error = str(emission.error or "")
            gate.release()
            progress(1)

    for i, ask in enumerate(workload):
        gate.acquire()
        name = f"{began}-{i}"
        records[name] = Record(len(ask.prompt), time.perf_counter() - began)
        sampling = Sampling(max_tokens=ask.num_output, temperature=ask.temperature)
        engine.submit(Request(id=name, prompt=list(ask.prompt), sampling=sampling), listen)
    for _ in range(concurrency):
        gate.acquire()
    return list(records.values()), time.perf_counter() - began
