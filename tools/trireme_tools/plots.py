"""Pictures: a load as the client saw it, plans side by side, steps as bars and one by one, loads of ranks. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from trireme_tools.load import Record
from trireme_tools.timeline import Bar, Steps

_INK, _ACCENT, _PALE = "#22313f", "#2a7ab9", "#d9e2ec"


def plot_load(records: Sequence[Record], report: dict[str, Any], path: Path) -> None:
    """Latency distributions, and output tokens a second over the run."""
    good = [record for record in records if not record.error]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    first, gaps, rate = figure.subplots(1, 3)
    for axes, values, title in (
        (first, [record.first_token_s for record in good], "time to first token"),
        (gaps, np.concatenate([record.gaps_s for record in good]) if good else [], "inter-token latency"),
    ):
        _distribution(axes, np.sort(np.asarray(values)) * 1e3, title)
    arrivals = np.sort(np.concatenate([record.arrivals for record in good])) if good else np.zeros(0)
    edges = np.linspace(0, max(report["trireme"]["seconds"], 1e-9), 31)
    rate.stairs(np.histogram(arrivals, edges)[0] / np.diff(edges), edges, fill=True, color=_PALE, edgecolor=_ACCENT)
    mean = report["trireme"]["output_tokens_per_s"]
    rate.axhline(mean, color=_ACCENT, label=f"trireme {mean:.1f} tok/s")
    if "transformers" in report:
        peer = report["transformers"]["output_tokens_per_s"]
        rate.axhline(peer, color=_INK, linestyle="--", label=f"transformers {peer:.1f} tok/s")
    rate.set(title="output tokens a second", xlabel="seconds", ylim=(0, None))
    rate.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def _distribution(axes: Any, values: np.ndarray, title: str) -> None:
    """Share of values below x, with p50 and p99 marked."""
    axes.set(title=title, xlabel="ms", ylabel="share", ylim=(0, 1.02))
    if len(values):
        axes.plot(values, np.linspace(0, 1, len(values)), color=_ACCENT)
        for p in (50, 99):
            at = np.percentile(values, p)
            axes.axvline(at, color=_INK, linewidth=0.7, linestyle=":")
            axes.annotate(f"p{p} {at:.1f}", (at, p / 100), textcoords="offset points", xytext=(4, -10), fontsize=8)


def plot_prefill(reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Time to the first token of one prompt against its length, a line for each plan; and how many times as fast as the first
    plan each is."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    times, ratios = figure.subplots(1, 2)
    first: dict[int, float] = {}
    for report in reports:
        seconds = {each["input_len"]: each["seconds"] for each in report["prefill"] if each["prompts"] == 1}
        first = first or seconds
        times.plot(seconds.keys(), [each * 1e3 for each in seconds.values()], marker="o", markersize=3, label=report["plan"])
        shared = [length for length in seconds if length in first]
        ratios.plot(shared, [first[length] / seconds[length] for length in shared], marker="o", markersize=3, label=report["plan"])
    times.set(title="time to the first token", xlabel="tokens of the prompt", ylabel="ms", ylim=(0, None))
    ratios.set(title=f"times as fast as {reports[0]['plan']}", xlabel="tokens of the prompt", ylim=(0, None))
    times.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_decode(reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tokens a second, and the time of a step, against sequences that decode at once; a line for each plan."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    rates, times = figure.subplots(1, 2)
    for report in reports:
        batches = [each["batch"] for each in report["decode"]]
        steps = [each["step_ms"] for each in report["decode"]]
        rates.plot(
            batches, [1e3 * batch / ms for batch, ms in zip(batches, steps, strict=True)], marker="o", markersize=3, label=report["plan"]
        )
        times.plot(batches, steps, marker="o", markersize=3, label=report["plan"])
    rates.set(title="decode: tokens a second", xlabel="sequences at once", ylim=(0, None))
    times.set(title="a step", xlabel="sequences at once", ylabel="ms", ylim=(0, None))
    rates.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_pipeline(bars: Sequence[Bar], path: Path, title: str) -> None:
    """Stages as rows, steps as bars of one colour per step, receiving hatched; what stays white is a bubble."""
    began = min(bar.began for bar in bars)
    stages = sorted({bar.stage for bar in bars})
    figure = Figure(figsize=(14, 1.2 + 0.9 * len(stages)), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab20"]
    for bar in bars:
        left, colour = (bar.began - began) * 1e3, colours(bar.number % 20)
        axes.barh(bar.stage, bar.receiving * 1e3, left=left, height=0.7, facecolor="none", edgecolor=colour, hatch="////", linewidth=0.5)
        axes.barh(bar.stage, bar.busy * 1e3, left=left + bar.receiving * 1e3, height=0.7, color=colour, edgecolor="white", linewidth=0.3)
        if len(bars) <= 80:
            axes.text(left + (bar.receiving + bar.busy / 2) * 1e3, bar.stage, str(bar.number), ha="center", va="center", fontsize=7)
    axes.set(
        title=title,
        xlabel="ms (hatched: waits for rows or tokens of another stage; white: a bubble)",
        yticks=stages,
        yticklabels=[f"stage {stage}" for stage in stages],
    )
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def plot_heat(panels: Mapping[str, np.ndarray], names: Sequence[str], path: Path) -> None:
    """Loads [layers, ranks] by title, side by side: each rank's as a multiple of its layer's mean, all in one scale."""
    shown = {title: loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-9) for title, loads in panels.items()}
    most = max(1.01, *(float(loads.max()) for loads in shown.values()))
    figure = Figure(figsize=(2.5 + 3.5 * len(shown), 1.8 + 0.24 * len(names)), layout="constrained")
    every = figure.subplots(1, len(shown), squeeze=False)[0]
    colours = LinearSegmentedColormap.from_list("load", ["white", _PALE, _ACCENT, _INK])
    for axes, (title, loads) in zip(every, shown.items(), strict=True):
        image = axes.imshow(loads, cmap=colours, vmin=0, vmax=most, aspect="auto")
        axes.set(title=title, xlabel="rank", xticks=range(loads.shape[1]), yticks=range(len(names)), yticklabels=names)
        for layer, rank in np.ndindex(loads.shape):
            dark = loads[layer, rank] > 0.6 * most
            axes.text(rank, layer, f"{loads[layer, rank]:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else _INK)
    every[0].set_ylabel("layer")
    figure.colorbar(image, ax=every, label="load / mean of the layer's ranks")
    figure.savefig(path, dpi=120)


def plot_steps(runs: Mapping[str, Steps], long: float, path: Path) -> None:
    """Every step's time over a run, a panel each, all in one scale: shaded while experts move, commits marked, and a line at `long`
    times the median. What is beyond the scale stands at its edge, with its time."""
    usual = float(np.median(np.concatenate([steps.took for steps in runs.values()])))
    top = 2.5 * usual
    figure = Figure(figsize=(13, 2.4 * len(runs) + 0.6), layout="constrained")
    every = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (title, steps) in zip(every, runs.items(), strict=True):
        for at, (first, last) in enumerate(steps.moving):
            axes.axvspan(first, last, color=_PALE, linewidth=0, label="experts move" if not at else None)
        commits = steps.number[steps.stalled > 0]
        axes.plot(commits, np.zeros(len(commits)), "|", color=_INK, markersize=12, label="maps in force")
        axes.plot(steps.number, np.minimum(steps.took, top), ".", color=_ACCENT, markersize=3)
        axes.axhline(long * np.median(steps.took), color=_INK, linewidth=0.7, linestyle=":", label=f"{long:g} x the median")
        for at in np.flatnonzero(steps.took > top):
            axes.annotate(f"{steps.took[at]:.0f} ms", (steps.number[at], top), textcoords="offset points", xytext=(4, -8), fontsize=7)
        axes.set(title=title, ylabel="ms of a step", ylim=(0, 1.05 * top))
    every[0].legend(fontsize=7, loc="upper right", ncols=3)
    every[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)
