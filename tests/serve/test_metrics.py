"""Metrics: what the server is told, with a made-up MetricFamily."""

from __future__ import annotations

import signal
import subprocess
import sys
from types import SimpleNamespace

from trireme.core.control import RankState, StageState
from trireme.engine.stats import Stats
from trireme.serve.metrics import FAMILIES, Reporter, eplb_samples, samples, service_samples, stage_samples

SEEN = {  # of one stage, whose layer 3 the service knows
    "stages": [
        {
            "stage": 1,
            "version": 4,
            "age_s": 12.3,
            "moved_bytes": 4096,
            "stalled_s": 0.5,
            "num_faults": 0,
            "layers": [
                {"layer": "3", "rank_loads": [30.0, 10.0], "balance": {"10": 1.0, "100": 2 / 3, "1000": 1.0}},
                {"layer": "mtp", "rank_loads": None, "balance": {"10": None, "100": None, "1000": None}},
            ],
        }
    ]
}


class Family:
    """Keeps every series in `Family.series`; a counter refuses to fall."""

    COUNTER, GAUGE = "counter", "gauge"
    series: dict[tuple, float]

    def __init__(self, name, description, kind):
        self.name, self.kind = name, kind
        assert description

    def Metric(self, labels):  # the server's spelling
        key = (self.name, *sorted(labels.items()))

        def increment(by):
            assert by > 0
            self.series[key] = self.series.get(key, 0) + by

        def assign(value):
            assert self.kind == "gauge"
            self.series[key] = value

        return SimpleNamespace(increment=increment, set=assign)


def test_report():
    Family.series = {}
    stats = Stats(num_stages=2)
    stages = SimpleNamespace(num_abandoned=1, num_reloads=0)
    states = [
        StageState(0, "ready", ranks=[RankState(0, "ready"), RankState(1, "ready")]),
        StageState(1, "healing", ranks=[RankState(0, "ready"), RankState(1, "dead")], restarts=2),
        None,
    ]

    def read():
        yield from samples(stats, stages)
        for stage, state in enumerate(states):
            yield from stage_samples(stage, state, num_ranks=2)

    reporter = Reporter(Family, read, {"model": "llm", "version": "1"}, stats)
    stats.running, stats.generation_tokens = 3, 10
    stats.finished["stop"] += 2
    stats.verified(num_drafts=3, num_accepted=2)
    stats.verified(num_drafts=3, num_accepted=1)
    stats.observed.time_to_first_token.extend([0.004, 0.2, 100.0])
    reporter.send(reporter.collect())
    stats.running, stats.generation_tokens = 1, 15
    stats.observed.time_to_first_token.append(0.004)
    reporter.send(reporter.collect())

    def value(name, **labels):
        return Family.series[(f"trireme_{name}", *sorted({"model": "llm", "version": "1", **labels}.items()))]

    assert value("requests_running") == 1
    assert value("generation_tokens_total") == 15
    assert value("requests_finished_total", reason="stop") == 2
    assert value("mtp_drafted_tokens_total") == 6 and value("mtp_accepted_tokens_total") == 3
    assert value("mtp_verifications_total") == 2 and value("mtp_acceptance_length") == 2.5
    assert value("bls_abandoned_threads") == 1
    assert value("time_to_first_token_seconds_count") == 4
    assert value("time_to_first_token_seconds_bucket", le="0.005") == 2
    assert value("time_to_first_token_seconds_bucket", le="0.25") == 3
    assert value("time_to_first_token_seconds_bucket", le="+Inf") == 4
    assert value("time_to_first_token_seconds_sum") == 100.208
    assert value("stage_ready", stage="0") == 1 and value("stage_ready", stage="1") == 0
    assert value("rank_state", stage="1", rank="0", state="ready") == value("rank_state", stage="1", rank="1", state="dead") == 1
    assert value("stage_rank_restarts", stage="1") == 2
    assert value("stage_ready", stage="2") == 0 and all(value("rank_state", stage="2", rank=rank, state="dead") for rank in "01")
    reporter.stop()
    assert not reporter._metrics and not reporter._families


STUCK = """
import sys, time
sys.path[:] = {path!r}
from trireme.serve.metrics import Reporter, Sample
libc = __import__("ctypes").PyDLL(None)  # whose calls hold the interpreter's lock
class Family:
    COUNTER = GAUGE = ""
    def __init__(self, **_): pass
    def Metric(self, labels): libc.pause()
reporter = Reporter(Family, lambda: [Sample("requests_running", 1.0)], {{}})
print("starts", flush=True)
reporter.start()
time.sleep(600)
"""


def test_a_server_that_is_gone_takes_the_process_along():
    """Its answer never comes, and whoever waits for it lets no other thread run."""
    process = subprocess.Popen([sys.executable, "-c", STUCK.format(path=sys.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "starts\n"
        assert process.wait(60) == -signal.SIGALRM
    finally:
        process.kill()


def test_every_sample_has_a_family():
    stats = Stats(num_stages=1)
    stats.finished["stop"] += 1
    found = {sample.name for sample in samples(stats, SimpleNamespace(num_abandoned=0, num_reloads=0))}
    found |= {sample.name for sample in stage_samples(0, StageState(0, "ready", ranks=[RankState(0, "ready")]), 1)}
    found |= {sample.name for sample in service_samples(True)} | {sample.name for sample in eplb_samples(SEEN)}
    plain = {name for name in FAMILIES if not name.endswith(("_bucket", "_sum", "_count"))}
    assert found == plain


def test_of_the_service():
    Family.series = {}
    reporter = Reporter(Family, lambda: eplb_samples(SEEN), {"model": "llm"})
    reporter.send(reporter.collect())
    at = {"layer": "3", "model": "llm", "stage": "1"}
    assert Family.series["trireme_eplb_balancedness", *sorted(at.items())] == 2 / 3
    loads = {dict(key[1:])["rank"]: value for key, value in Family.series.items() if key[0] == "trireme_eplb_expert_load"}
    assert loads == {"0": 30.0, "1": 10.0}
    assert Family.series["trireme_eplb_moved_bytes_total", ("model", "llm"), ("stage", "1")] == 4096
    assert not any(("layer", "mtp") in key for key in Family.series)


def test_a_server_without_metrics_stops_the_reporter():
    def refuse(**_):
        raise RuntimeError("metrics not supported")

    refuse.GAUGE = refuse.COUNTER = 0
    stats = Stats()
    reporter = Reporter(refuse, lambda: samples(stats, SimpleNamespace(num_abandoned=0, num_reloads=0)), {}, stats)
    reporter.start()
    reporter._thread.join(5)
    assert not reporter._thread.is_alive()
