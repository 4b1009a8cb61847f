"""`trireme eplb bench`: what balancing brings to the steps of a decode, and what it costs them while experts move. No server."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.engine.eplb_file import read
from trireme.engine.placing import Slots, balance, trivial
from trireme.models.spec import read_spec
from trireme_tools.kernel_time import MIXTURE, SUMS
from trireme_tools.offline import measure
from trireme_tools.plots import plot_steps
from trireme_tools.profiler import Profile, Profiler, decodes
from trireme_tools.progress import progress_bar
from trireme_tools.serve import settings_of
from trireme_tools.settings_options import override, settings_options
from trireme_tools.timeline import Bar, Steps, read_bars, steps_of
from trireme_tools.workload import make_workload

_NEIGHBOURS = 8  # steps on each side that a step is held against
_LONG = 1.5  # times as long as its neighbours: what no step near a move should be
_NAMED = 3  # longest steps that a report names, near moves and elsewhere
_WINDOWS: Mapping[str, float] = MappingProxyType({"early": 0.08, "late": 0.9})  # what is profiled, by how much of a run is before it
_BEHIND = 12  # steps after a window: the device had nothing to do while the window was told, and then all that was in line
_FIGURES = (("mixture_ms", ""), ("mixture_ms", "_mean"), ("sums_ms", "_mean"))  # of windows


@settings_options
def bench(
    *,
    model: Annotated[Path | None, typer.Option(help="Checkpoint (default: the project's).")] = None,
    batch: Annotated[int, typer.Option(help="Sequences that decode at once.", min=1)] = 64,
    input_len: Annotated[int, typer.Option(help="Prompt tokens of each.", min=1)] = 128,
    output_len: Annotated[int, typer.Option(help="Output tokens of each: decode steps, in which experts move.", min=2)] = 512,
    bounds: Annotated[
        bool, typer.Option(help="Run also with no copies and no moves and, for the bound, so with a router that is even.")
    ] = True,
    profile: Annotated[
        bool,
        typer.Option(help="GPUs: also the mixtures' own time in a window of steps early in each run and in one late, the busiest rank's."),
    ] = False,
    output: Annotated[Path, typer.Option(help="Where to write the report, and beside it NAME.png: every step's time.")] = Path(
        "build/eplb/bench.json"
    ),
    chosen: dict[str, Any],
) -> None:
    """Time decode steps before, while and after experts move. With dummy weights say --eplb-dispatch skewed, else loads are even."""
    settings = settings_of(model, chosen)
    if settings.eplb is None or settings.expert_parallel_size == 1:
        raise Refusal("nothing can be balanced", why="settings have no eplb, or ep is 1", fix="add --eplb auto --ep N")
    runs = {"moving": settings}
    if bounds:
        runs["still"] = override(settings, {"eplb": {"min_gain": 1.0, "num_redundant_experts": 0}})
        runs["even"] = override(runs["still"], {"eplb": {"dispatch": "fake"}})
    reports, steps, picture, console = {}, {}, output.with_suffix(".png"), Console()
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, each in runs.items():
        reports[name], stages = _run(name, each, batch, input_len, output_len, Profiler() if profile else None)
        steps |= {f"{name}, stage {at}": stage for at, stage in enumerate(stages)}
        report = {"batch": batch, "input_len": input_len, "output_len": output_len, **reports}
        output.write_text(json.dumps(report, indent=1) + "\n")
        plot_steps(steps, _LONG, picture)
        _show_longest(console, name, reports[name])
    if not any(stage["moves"] for stage in reports["moving"]["stages"]):
        console.print("No experts moved: it would have saved too little. With --eplb-min-gain 0 they move all the same.")
    _show(console, reports)
    console.print(f"written: {output}, {picture}")


def _run(
    name: str, settings: Settings, batch: int, input_len: int, output_len: int, profiler: Profiler | None
) -> tuple[dict[str, Any], list[Steps]]:
    assert settings.eplb is not None, "checked"
    vocab_size = read_spec(Path(settings.model)).vocab_size
    with tempfile.TemporaryDirectory(prefix="trireme-eplb-") as folder:
        trace, state = Path(folder) / "steps.jsonl", Path(folder) / "state"
        kept = override(settings, {"step_trace": str(trace), "eplb": {"state": str(state)}})
        with progress_bar(Console(stderr=True), name, batch) as tick:
            asks = make_workload(batch, str(input_len), str(output_len), vocab_size)
            windows = {name: decodes(output_len, share) for name, share in _WINDOWS.items()}
            records, seconds, _ = measure(kept, asks, batch, tick, profiler, windows)
        if errors := [record.error for record in records if record.error]:
            raise Refusal(f"{len(errors)} requests failed", why=errors[0], kind="internal")
        events = json.loads((state / "eplb.json").read_text())
        balances = _balances(state / "eplb.safetensors", settings.expert_parallel_size)
        bars = read_bars(trace.read_text().splitlines())
    if profiler is not None:
        bars = without_profiled(bars, profiler.profiles)
        for stage, found in enumerate(balances):
            found |= mixture_times([each for each in profiler.profiles if each.stage == stage])
    steps = [steps_of([bar for bar in bars if bar.stage == stage], batch, history) for stage, history in enumerate(events)]
    stages = [steps_around_moves(each, history) | balances[stage] for stage, (each, history) in enumerate(zip(steps, events, strict=True))]
    return {"output_tokens_per_s": batch * output_len / seconds, "stages": stages}, steps


def without_profiled(bars: Sequence[Bar], profiles: Sequence[Profile]) -> list[Bar]:
    """With no rows in steps that took longer since they were recorded, or came behind one that was: they are no decodes to look at."""
    slow = {number for each in profiles for number in range(each.first - 1, each.last + _BEHIND)}
    return [bar._replace(rows=0) if bar.number in slow else bar for bar in bars]


def mixture_times(profiles: Sequence[Profile]) -> dict[str, float]:
    """Of one stage's ranks: the time of a step that routing and experts take, all layers, the busiest rank's and the mean; and that of
    the sums after them, in which the others wait for the busiest. Milliseconds; nothing where no kernel is known as a mixture's, as
    among the ops of a CPU."""
    found = {}
    for name in _WINDOWS:
        ranks = [{group.name: group.ms for group in each.window.groups} for each in profiles if each.what == name]
        if any(group in rank for rank in ranks for group in MIXTURE):
            times = [sum(rank.get(group, 0.0) for group in MIXTURE) for rank in ranks]
            found |= {f"mixture_ms_{name}": max(times), f"mixture_ms_{name}_mean": float(np.mean(times))}
            found[f"sums_ms_{name}_mean"] = float(np.mean([sum(rank.get(group, 0.0) for group in SUMS) for rank in ranks]))
    return found


def steps_around_moves(steps: Steps, history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians before the first balancing move and after the last, what commits stalled, and the steps that are longest for their
    neighbours, while experts moved and elsewhere. Milliseconds. Refusal where too few steps decoded all sequences to say that."""
    balancing = [event for event in history if event["reason"] == "balance"]
    before = steps.number < (balancing[0]["offered"] if balancing else np.inf)
    after = steps.number > (balancing[-1]["step"] if balancing else np.inf)
    if len(steps.number) < 4 * _NEIGHBOURS:
        why = f"{len(steps.number)} steps decoded all sequences"
        raise Refusal("too few decode steps", why=why, fix="raise --output-len, and give max_num_seqs and steps room for the batch")
    over, near = _over_neighbours(steps.took), steps.near
    parts = {"near_moves": near, "elsewhere": ~near}
    return {
        "steps": len(steps.number),
        "commits": int((steps.stalled > 0).sum()),
        "moves": len(balancing),
        "received_experts": sum(event["received"] for event in balancing),
        "moved_bytes": sum(event["moved_bytes"] for event in balancing),
        "step_ms_before": _median(steps.took[before]),
        "step_ms_while": _median(steps.took[~before & ~after & near]),
        "step_ms_after": _median(steps.took[after]),
        "busy_ms_before": _median(steps.device[before]),
        "busy_ms_after": _median(steps.device[after]),
        "stalled_ms": float(steps.stalled.sum()),
        "stalled_ms_longest": float(steps.stalled.max()),
        **{f"steps_{name}": int(part.sum()) for name, part in parts.items()},
        **{f"steps_over_{_LONG}_{name}": int((over[part] > _LONG).sum()) for name, part in parts.items()},
        **{f"longest_over_neighbours_{name}": float(over[part].max()) if part.any() else None for name, part in parts.items()},
        "longest": {name: _longest(steps, over, part) for name, part in parts.items()},
        "faults": [event["fault"] for event in history if event["reason"] == "fault"],
    }


def _longest(steps: Steps, over: np.ndarray, part: np.ndarray) -> list[dict[str, Any]]:
    """The steps of a part that are longest for their neighbours, and what of each was longest for its neighbours': `device`, from its
    first launch to its last kernel's end, other ranks waited for too; `waiting`, until it was launched; `telling`, until its rank's
    host knew of its end."""
    ways = {"device": steps.device, "waiting": steps.waiting, "telling": steps.took - steps.device - steps.waiting}
    found = []
    for at in [at for at in np.argsort(-over).tolist() if part[at]][:_NAMED]:
        number = int(steps.number[at])
        more = {name: values[at] - np.median(_around(values, at)) for name, values in ways.items()}
        since = [number - first for first, last in steps.moving if first <= number <= last]
        found.append(
            {
                "step": number,
                "after_offer": since[-1] if since else None,
                "commits": bool(steps.stalled[at] > 0),
                "ms": float(steps.took[at]),
                "neighbours_ms": float(steps.took[at] / over[at]),
                "over_neighbours": float(over[at]),
                "device_ms": float(steps.device[at]),
                "waiting_ms": float(steps.waiting[at]),
                "longer_in": max(more, key=more.__getitem__),
            }
        )
    return found


def _over_neighbours(took: np.ndarray) -> np.ndarray:
    """Each step's time over the median of those around it.

    >>> _over_neighbours(np.array([1.0, 1, 3, 1, 1])).tolist()
    [1.0, 1.0, 3.0, 1.0, 1.0]
    """
    return np.array([each / np.median(_around(took, at)) for at, each in enumerate(took)])


def _around(values: np.ndarray, at: int) -> np.ndarray:
    """Those of `values` [N] on both sides of one, without it."""
    return np.concatenate([values[max(0, at - _NEIGHBOURS) : at], values[at + 1 : at + 1 + _NEIGHBOURS]])


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


def _balances(path: Path, num_ranks: int) -> list[dict[str, float]]:
    """Of each stage, over the last pushes: the mean of its layers' balance as it ended, and as if each expert were once, in order."""
    contents, found = read(path), []
    for stage in range(len({name.split(".")[0] for name in contents.arrays})):
        recent, maps = contents.stage(stage, "recent"), contents.stage(stage, "maps")
        assert recent is not None and maps is not None, "a service saves both"
        loads = recent.sum(axis=0, dtype=np.int64)
        slots = Slots(loads.shape[1], maps.shape[1], num_ranks)
        plain = slots._replace(num_slots=slots.num_experts)
        each = [(balance(trivial(plain), load, plain), balance(map_, load, slots)) for load, map_ in zip(loads, maps, strict=True)]
        was, now = np.array(each).mean(axis=0)
        found.append({"balance_plain": float(was), "balance_end": float(now), "balance_end_least": float(np.array(each)[:, 1].min())})
    return found


def _show(console: Console, reports: dict[str, dict[str, Any]]) -> None:
    rows = (
        "step_ms_before",
        "step_ms_while",
        "step_ms_after",
        "busy_ms_before",
        "busy_ms_after",
        "balance_plain",
        "balance_end",
        "commits",
        "moves",
    )
    rows += ("received_experts", "stalled_ms", "stalled_ms_longest")
    for part in ("near_moves", "elsewhere"):
        rows += (f"steps_{part}", f"steps_over_{_LONG}_{part}", f"longest_over_neighbours_{part}")
    columns = [(f"{name}, stage {at}", stage) for name, report in reports.items() for at, stage in enumerate(report["stages"])]
    profiled = (f"{figure}_{name}{mean}" for figure, mean in _FIGURES for name in _WINDOWS)
    rows += tuple(row for row in profiled if any(row in stage for _, stage in columns))
    table = Table("", *(title for title, _ in columns))
    for row in rows:
        cells = [stage.get(row) for _, stage in columns]
        table.add_row(
            row.replace("_", " "), *("" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
        )
    console.print(table)


def _show_longest(console: Console, name: str, report: dict[str, Any]) -> None:
    """Of one run: which steps those are, and what of them took longer."""
    for at, stage in enumerate(report["stages"]):
        for part, steps in stage["longest"].items():
            if steps:
                console.print(f"longest steps of {name}, stage {at}, {part.replace('_', ' ')}:")
            for step in steps:
                where = "" if step["after_offer"] is None else f", {step['after_offer']} after an offer"
                where += ", puts maps in force" if step["commits"] else ""
                times = f"{step['ms']:.1f} ms, {step['over_neighbours']:.2f} x its neighbours"
                ways = f"device {step['device_ms']:.1f}, waiting {step['waiting_ms']:.1f}; longer in {step['longer_in']}"
                console.print(f"  step {step['step']}{where}: {times}; {ways}", soft_wrap=True)
