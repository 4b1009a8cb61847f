"""Workloads, loads and timelines in numbers: what `bench` and `trace` compute, without a server."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trireme.core.refusal import Refusal
from trireme_tools.load import Record, summary
from trireme_tools.plots import plot_load, plot_pipeline
from trireme_tools.problems import held_out_problems
from trireme_tools.timeline import Bar, bubble_ratio, chrome_trace, read_bars
from trireme_tools.workload import arrivals, make_workload, seqs256, word_problems

# Two stages, two steps: stage 1 waits for the first step, stage 0 idles at the end.
#   stage 0   [0][1].
#   stage 1   .[0][1]
BARS = [Bar(0, 0, 0, 4, 0.0, 0.0, 1.0), Bar(0, 1, 0, 4, 1.0, 0.0, 1.0), Bar(1, 0, 0, 4, 0.5, 0.5, 1.0), Bar(1, 1, 0, 4, 2.0, 0.0, 1.0)]


def test_seqs256_is_the_published_workload():
    asks = seqs256(vocab_size=151936)
    assert len(asks) == 256
    assert (sum(len(ask.prompt) for ask in asks), sum(ask.num_output for ask in asks)) == (142827, 133966)
    assert max(max(ask.prompt) for ask in seqs256(vocab_size=1000)) < 1000


def test_word_problems_have_outputs_as_long_as_their_solutions():
    problems = held_out_problems(3)
    asks = word_problems(3, lambda text: list(text.encode()))
    assert [bytes(ask.prompt).decode() for ask in asks] == [problem.prompt for problem in problems]
    assert [ask.num_output for ask in asks] == [len(problem.solution) for problem in problems]


@pytest.mark.parametrize("length", ["", "x", "0", "9-3"])
def test_bad_length_is_refused(length: str):
    with pytest.raises(Refusal, match="not understood"):
        make_workload(1, length, "4", 100)


def test_arrivals_have_the_rate():
    assert not arrivals(5, None).any()
    assert arrivals(4000, 10.0)[-1] == pytest.approx(400, rel=0.1)


def test_summary_counts_good_requests_alone():
    good = Record(num_input=10, sent=1.0, arrivals=[1.5, 1.6, 1.8])
    report = summary([good, Record(num_input=5, sent=0.0, error="queue full")], seconds=2.0)
    assert (report["requests"], report["failed"], report["output_tokens"], report["input_tokens"]) == (1, 1, 3, 10)
    assert report["output_tokens_per_s"] == 1.5 and report["total_tokens_per_s"] == 6.5
    assert report["ttft_ms"]["p50"] == pytest.approx(500) and report["itl_ms"]["mean"] == pytest.approx(150)


def test_bubbles_of_a_drawn_pipeline():
    assert bubble_ratio(BARS) == pytest.approx({0: 1 / 3, 1: 1 / 3})


def test_trace_reads_what_the_engine_writes():
    lines = [json.dumps({**bar._asdict(), "samples": 1}) for bar in reversed(BARS)]
    assert read_bars(lines) == [*BARS[:1], BARS[2], BARS[1], BARS[3]]
    with pytest.raises(Refusal, match="line 2"):
        read_bars([lines[0], "{"])
    with pytest.raises(Refusal, match="empty"):
        read_bars([])


def test_chrome_trace_shows_receiving_before_computing():
    events = [event for event in chrome_trace(BARS)["traceEvents"] if event["ph"] == "X" and event["pid"] == 1]
    assert [(event["name"], event["ts"], event["dur"]) for event in events[:2]] == [("receive", 0.5e6, 0.5e6), ("step 0", 1e6, 1e6)]


def test_pictures_are_drawn(tmp_path):
    records = [Record(4, 0.0, arrivals=list(np.linspace(0.1, 1, 10))), Record(4, 0.0, error="no")]
    report = {"trireme": summary(records, 1.0), "transformers": {"output_tokens_per_s": 5.0}}
    plot_load(records, report, tmp_path / "load.png")
    plot_pipeline(BARS, tmp_path / "pipeline.png", "two steps")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("load.png", "pipeline.png"))
