"""`trireme eplb bench`: what balancing brings to the steps of a decode, and what it costs them while experts move. No server."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
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
from trireme_tools.offline import measure
from trireme_tools.progress import progress_bar
from trireme_tools.serve import settings_of
from trireme_tools.settings_options import override, settings_options
from trireme_tools.timeline import Bar, read_bars
from trireme_tools.workload import make_workload

_NEIGHBOURS = 8  # steps on each side that a step is held against
_NEAR = 4  # steps from one that put maps in force: still of the rebalance


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
    output: Annotated[Path, typer.Option(help="Where to write NAME.json.")] = Path("build/eplb/bench.json"),
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
    reports = {name: _run(name, each, batch, input_len, output_len) for name, each in runs.items()}
    report = {"batch": batch, "input_len": input_len, "output_len": output_len, **reports}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    _show(Console(), reports)
    Console().print(f"written: {output}")


def _run(name: str, settings: Settings, batch: int, input_len: int, output_len: int) -> dict[str, Any]:
    assert settings.eplb is not None, "checked"
    vocab_size = read_spec(Path(settings.model)).vocab_size
    with tempfile.TemporaryDirectory(prefix="trireme-eplb-") as folder:
        trace, state = Path(folder) / "steps.jsonl", Path(folder) / "state"
        kept = override(settings, {"step_trace": str(trace), "eplb": {"state": str(state)}})
        with progress_bar(Console(stderr=True), name, batch) as tick:
            records, seconds, _ = measure(kept, make_workload(batch, str(input_len), str(output_len), vocab_size), batch, tick)
        if errors := [record.error for record in records if record.error]:
            raise Refusal(f"{len(errors)} requests failed", why=errors[0], kind="internal")
        events = json.loads((state / "eplb.json").read_text())
        balances = _balances(state / "eplb.safetensors", settings.expert_parallel_size)
        bars = read_bars(trace.read_text().splitlines())
    stages = [
        steps_around_moves([bar for bar in bars if bar.stage == stage], batch, history) | balances[stage]
        for stage, history in enumerate(events)
    ]
    return {"output_tokens_per_s": batch * output_len / seconds, "stages": stages}


def steps_around_moves(bars: Sequence[Bar], batch: int, history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one stage's steps, the decodes of `batch` sequences: medians before the first balancing move and after the last, what
    commits stalled, and the step that is longest for its neighbours, near commits and elsewhere. Milliseconds. A step takes from
    the end of the one before to its own."""
    bars = sorted(bars, key=lambda bar: (bar.epoch, bar.number))
    pairs = [(before, bar) for before, bar in pairwise(bars) if before.rows == bar.rows == batch]
    if len(pairs) < 4 * _NEIGHBOURS:
        why = f"{len(pairs)} steps decoded {batch} sequences each"
        raise Refusal("too few decode steps", why=why, fix="raise --output-len, and give max_num_seqs and steps room for the batch")
    numbers = np.array([bar.number for _, bar in pairs])
    took = np.array([bar.ended - before.ended for before, bar in pairs]) * 1e3
    busy = np.array([bar.busy for _, bar in pairs]) * 1e3
    stalled = np.array([bar.stalled for _, bar in pairs]) * 1e3
    commits = numbers[stalled > 0]
    # the service hears of a move with the next push: the move itself is the last commit before that
    heard = [event["step"] for event in history if event["reason"] == "balance"]
    moved = [int(commits[commits <= step].max()) for step in heard if (commits <= step).any()]
    near = np.array([bool(len(commits)) and np.abs(commits - number).min() <= _NEAR for number in numbers])
    ratios = _over_neighbours(took)
    before = took[numbers < min(moved)] if moved else took
    after = took[numbers > max(moved)] if moved else took[:0]
    longest = np.argsort(-ratios)[:5]
    return {
        "steps": len(took),
        "commits": len(commits),
        "moves": len(heard),
        "received_experts": sum(event["received"] for event in history if event["reason"] == "balance"),
        "moved_bytes": sum(event.get("moved_bytes", 0) for event in history),
        "step_ms_before": _median(before),
        "step_ms_after": _median(after),
        "busy_ms_before": _median(busy[numbers < min(moved)] if moved else busy),
        "busy_ms_after": _median(busy[numbers > max(moved)] if moved else busy[:0]),
        "stalled_ms": float(stalled.sum()),
        "stalled_ms_longest": float(stalled.max()),
        "longest_over_neighbours_near_moves": float(ratios[near].max()) if near.any() else None,
        "longest_over_neighbours_elsewhere": float(ratios[~near].max()) if (~near).any() else None,
        "longest": [
            {"step": int(numbers[at]), "ms": float(took[at]), "over_neighbours": float(ratios[at]), "near": bool(near[at])}
            for at in longest
        ],
        "faults": [event["fault"] for event in history if event["reason"] == "fault"],
    }


def _over_neighbours(took: np.ndarray) -> np.ndarray:
    """Each step's time over the median of those around it.

    >>> _over_neighbours(np.array([1.0, 1, 3, 1, 1])).tolist()
    [1.0, 1.0, 3.0, 1.0, 1.0]
    """
    found = np.empty(len(took))
    for at in range(len(took)):
        around = np.concatenate([took[max(0, at - _NEIGHBOURS) : at], took[at + 1 : at + 1 + _NEIGHBOURS]])
        found[at] = took[at] / np.median(around)
    return found


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
    rows = ("step_ms_before", "step_ms_after", "busy_ms_before", "busy_ms_after", "balance_plain", "balance_end", "commits", "moves")
    rows += ("received_experts", "stalled_ms", "stalled_ms_longest")
    rows += ("longest_over_neighbours_near_moves", "longest_over_neighbours_elsewhere")
    columns = [(f"{name}, stage {at}", stage) for name, report in reports.items() for at, stage in enumerate(report["stages"])]
    table = Table("", *(title for title, _ in columns))
    for row in rows:
        cells = [stage[row] for _, stage in columns]
        table.add_row(
            row.replace("_", " "), *("" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
        )
    console.print(table)
