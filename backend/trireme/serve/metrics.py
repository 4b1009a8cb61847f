"""Metrics: the engine's numbers on the server's /metrics page, reported once a second from a thread. Nothing on the hot path.

One call of the server's metrics API costs 25 us (measured), so events are not reported one by one: histograms are counted
here and sent as the counters that a Prometheus histogram consists of (`_bucket` with label `le`, `_sum`, `_count`).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from trireme.core.control import RankState, StageState
from trireme.core.log import logger
from trireme.engine.stats import Stats
from trireme.serve.bls import BlsStages

METRICS_PERIOD_S = 1.0
_LOST_S = 10  # that the few hundred calls of one report may take
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
_RANK_STATES = ("starting", "loading", "ready", "dead", "failed")


class Sample(NamedTuple):
    """The value now of one series. A counter's only rises."""

    name: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


FAMILIES = {  # name without the prefix -> (kind, what it is)
    "requests_running": ("GAUGE", "Sequences that are computed"),
    "requests_waiting": ("GAUGE", "Sequences that wait for a place"),
    "pages_used": ("GAUGE", "Pages of 16 tokens in use"),
    "pages_total": ("GAUGE", "Pages of 16 tokens there are"),
    "snapshots_used": ("GAUGE", "Copies of sequences' states in use, where a model has states"),
    "snapshots_total": ("GAUGE", "Copies of sequences' states there is room for"),
    "preemptions_total": ("COUNTER", "Sequences put back to the queue for want of pages"),
    "prompt_tokens_total": ("COUNTER", "Prompt tokens of requests that began to run"),
    "cached_tokens_total": ("COUNTER", "Prompt tokens taken from reused pages"),
    "snapshot_hits_total": ("COUNTER", "Sequences that began from a copy of states"),
    "generation_tokens_total": ("COUNTER", "Tokens made"),
    "mtp_verifications_total": ("COUNTER", "Times that a step verified a sequence's drafts"),
    "mtp_drafted_tokens_total": ("COUNTER", "Drafts that were verified"),
    "mtp_accepted_tokens_total": ("COUNTER", "Drafts that were the model's own tokens"),
    "mtp_acceptance_length": ("GAUGE", "Mean tokens of a sequence for each time its drafts were verified"),
    "requests_finished_total": ("COUNTER", "Sequences that ended, by reason"),
    "steps_total": ("COUNTER", "Steps planned"),
    "step_rows_total": ("COUNTER", "Rows of those steps"),
    "sp_steps_total": ("COUNTER", "Steps with sequence parallelism on"),
    "cp_steps_total": ("COUNTER", "Steps with context parallelism on"),
    "cp_fallback_steps_total": ("COUNTER", "Steps of prompts too short for the context parallelism there is"),
    "epochs_total": ("COUNTER", "Epochs joined by all stages; each beyond the first is a repair"),
    "faults_total": ("COUNTER", "Epochs that broke"),
    "stage_busy_seconds_total": ("COUNTER", "Seconds a stage computed"),
    "stage_waiting_seconds_total": ("COUNTER", "Seconds a stage waited for a step while others were in flight"),
    "stage_receiving_seconds_total": ("COUNTER", "Seconds a stage waited for rows or tokens of another"),
    "stage_bubble_ratio": ("GAUGE", "Share of the time with work in flight that a stage did not compute"),
    "stage_ready": ("GAUGE", "1 where the stage is ready"),
    "stage_reordered_steps": ("GAUGE", "Steps that came early and were held, since the stage began"),
    "stage_rank_restarts": ("GAUGE", "Ranks started again, since the stage began"),
    "rank_state": ("GAUGE", "1 at the state a rank is in"),
    "eplb_ready": ("GAUGE", "1 where the model eplb answers"),
    "eplb_balancedness": ("GAUGE", "Mean load of a layer's ranks / load of its busiest, over the last 100 reports"),
    "eplb_expert_load": ("GAUGE", "Rows that the experts of a rank were given in a layer, over the last 1000 reports"),
    "eplb_map_version": ("GAUGE", "Version of the expert maps of a stage: rises with each change"),
    "eplb_last_rebalance_age_seconds": ("GAUGE", "Seconds since the maps of a stage changed, or since the service began"),
    "eplb_moved_bytes_total": ("COUNTER", "Bytes of experts that went from rank to rank"),
    "eplb_stalled_seconds_total": ("COUNTER", "Seconds that steps waited for changes of maps"),
    "eplb_faults_total": ("COUNTER", "Changes of maps that a stage dropped"),
    "bls_abandoned_threads": ("GAUGE", "Calls to dead models that never return"),
    "bls_reloads_total": ("COUNTER", "Stages loaded again after their stub died"),
}
HISTOGRAMS = {  # of Stats.observed
    "time_to_first_token": ("time_to_first_token_seconds", "Arrival to first token"),
    "inter_token": ("inter_token_seconds", "Token to token of one sequence"),
    "end_to_end": ("end_to_end_seconds", "Arrival to the end of a sequence"),
    "queued": ("queue_seconds", "Arrival to the first place in a step"),
    "hop": ("bls_hop_seconds", "A step to one stage and back, without the stage's own time"),
}
for _name, (_family, _about) in HISTOGRAMS.items():
    FAMILIES |= {f"{_family}_{part}": ("COUNTER", _about) for part in ("bucket", "sum", "count")}


def samples(stats: Stats, stages: BlsStages) -> Iterator[Sample]:
    """Gauges and plain counters of the front, now."""
    yield Sample("requests_running", stats.running)
    yield Sample("requests_waiting", stats.waiting)
    yield Sample("pages_used", stats.pages_used)
    yield Sample("pages_total", stats.pages_total)
    yield Sample("snapshots_used", stats.snapshots_used)
    yield Sample("snapshots_total", stats.snapshots_total)
    yield Sample("preemptions_total", stats.preemptions)
    yield Sample("prompt_tokens_total", stats.prompt_tokens)
    yield Sample("cached_tokens_total", stats.cached_tokens)
    yield Sample("snapshot_hits_total", stats.snapshot_hits)
    yield Sample("generation_tokens_total", stats.generation_tokens)
    yield Sample("mtp_verifications_total", stats.verifications)
    yield Sample("mtp_drafted_tokens_total", stats.drafted_tokens)
    yield Sample("mtp_accepted_tokens_total", stats.accepted_tokens)
    yield Sample("mtp_acceptance_length", stats.acceptance_length)
    yield Sample("steps_total", stats.steps)
    yield Sample("step_rows_total", stats.rows)
    yield Sample("sp_steps_total", stats.sp_steps)
    yield Sample("cp_steps_total", stats.cp_steps)
    yield Sample("cp_fallback_steps_total", stats.cp_fallbacks)
    yield Sample("epochs_total", stats.epochs)
    yield Sample("faults_total", stats.faults)
    yield Sample("bls_abandoned_threads", stages.num_abandoned)
    yield Sample("bls_reloads_total", stages.num_reloads)
    for reason, count in dict(stats.finished).items():
        yield Sample("requests_finished_total", count, (("reason", reason),))
    for stage, times in enumerate(stats.stages):
        label = (("stage", str(stage)),)
        yield Sample("stage_busy_seconds_total", times.busy, label)
        yield Sample("stage_waiting_seconds_total", times.waiting, label)
        yield Sample("stage_receiving_seconds_total", times.receiving, label)
        yield Sample("stage_bubble_ratio", times.bubble_ratio, label)


def stage_samples(stage: int, state: StageState | None, num_ranks: int) -> Iterator[Sample]:
    """Of one stage's own answer; None where it gives none, and then nothing is known of its ranks but that they serve nobody."""
    label = (("stage", str(stage)),)
    yield Sample("stage_ready", float(state is not None and state.state == "ready"), label)
    if state is not None:
        yield Sample("stage_reordered_steps", state.reordered, label)
        yield Sample("stage_rank_restarts", state.restarts, label)
    for rank in state.ranks if state is not None else [RankState(number, "dead") for number in range(num_ranks)]:
        for name in _RANK_STATES:
            yield Sample("rank_state", float(rank.state == name), (*label, ("rank", str(rank.rank)), ("state", name)))


def service_samples(answers: bool) -> Iterator[Sample]:
    """Of the model `eplb`, as the front sees it."""
    yield Sample("eplb_ready", float(answers))


def eplb_samples(seen: dict[str, Any]) -> Iterator[Sample]:
    """Of all there is to see of a balancer. A layer whose map it does not know has no balance."""
    for stage in seen["stages"]:
        label = (("stage", str(stage["stage"])),)
        yield Sample("eplb_map_version", stage["version"], label)
        yield Sample("eplb_last_rebalance_age_seconds", round(stage["age_s"]), label)
        yield Sample("eplb_moved_bytes_total", stage["moved_bytes"], label)
        yield Sample("eplb_stalled_seconds_total", stage["stalled_s"], label)
        yield Sample("eplb_faults_total", stage["num_faults"], label)
        for layer in stage["layers"]:
            place = (*label, ("layer", layer["layer"]))
            if layer["rank_loads"] is not None:
                yield Sample("eplb_balancedness", layer["balance"]["100"], place)
                for rank, load in enumerate(layer["rank_loads"]):
                    yield Sample("eplb_expert_load", load, (*place, ("rank", str(rank))))


class Histogram:
    """Counts of seconds in buckets, as the series of a Prometheus histogram."""

    def __init__(self, family: str):
        self._family = family
        self._counts = np.zeros(len(_BUCKETS) + 1)
        self._sum = 0.0

    def add(self, seconds: Sequence[float]) -> None:
        self._counts += np.bincount(np.searchsorted(_BUCKETS, seconds), minlength=len(self._counts))
        self._sum += sum(seconds)

    def samples(self) -> Iterator[Sample]:
        for bound, count in zip((*map(str, _BUCKETS), "+Inf"), np.cumsum(self._counts), strict=True):
            yield Sample(f"{self._family}_bucket", count, (("le", bound),))
        yield Sample(f"{self._family}_sum", self._sum)
        yield Sample(f"{self._family}_count", self._counts.sum())


class Reporter:
    """Sends what changed to the server. `make_family` is pb_utils.MetricFamily; `read` gives gauges and plain counters; `stats` has
    what goes into histograms."""

    def __init__(self, make_family: Any, read: Callable[[], Iterable[Sample]], labels: dict[str, str], stats: Stats | None = None):
        self._make_family, self._read, self._stats, self._labels = make_family, read, stats, labels
        self._families: dict[str, Any] = {}  # kept: a metric without its family raises
        self._metrics: dict[tuple[str, tuple], Any] = {}
        self._last: dict[tuple[str, tuple], float] = {}
        self._histograms = {name: Histogram(family) for name, (family, _) in HISTOGRAMS.items()} if stats is not None else {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Also drops every metric: one that outlives the server's side of this process crashes it at its exit (seen on 24.10)."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._metrics.clear()
        self._families.clear()

    def _run(self) -> None:
        while not self._stop.wait(METRICS_PERIOD_S):
            try:
                found = self.collect()
                with _or_end(_LOST_S):
                    self.send(found)
            except Exception as error:  # the server runs without metrics, or is about to end
                logger("front").warning("metrics are not reported: %s", error)
                return

    def collect(self) -> list[Sample]:
        """Every series as it is now."""
        if self._stats is not None:
            for name, seconds in self._stats.drain().items():
                self._histograms[name].add(seconds)
        return [*self._read(), *(sample for histogram in self._histograms.values() for sample in histogram.samples())]

    def send(self, found: Iterable[Sample]) -> None:
        """What changed, to the server."""
        for sample in found:
            self._send(sample)

    def _send(self, sample: Sample) -> None:
        key = (sample.name, sample.labels)
        last = self._last.get(key)
        if last == sample.value:
            return
        kind, about = FAMILIES[sample.name]
        if sample.name not in self._families:
            kind_value = getattr(self._make_family, kind)
            self._families[sample.name] = self._make_family(name=f"trireme_{sample.name}", description=about, kind=kind_value)
        if key not in self._metrics:
            self._metrics[key] = self._families[sample.name].Metric(labels={**self._labels, **dict(sample.labels)})
        if kind == "GAUGE":
            self._metrics[key].set(sample.value)
        elif sample.value:  # one at 0 is only shown
            self._metrics[key].increment(sample.value - (last or 0.0))
        self._last[key] = sample.value


@contextlib.contextmanager
def _or_end(limit_s: int) -> Iterator[None]:
    """End this process where what is done here takes longer. A call of the server's metrics API holds the interpreter's lock until it is
    answered. One to a server that has just been killed never is, and no thread of this process could do anything about it (seen on
    24.10): it would live on for ever."""
    signal.alarm(limit_s)  # nobody handles it here, and what it does then takes no lock
    try:
        yield
    finally:
        signal.alarm(0)
