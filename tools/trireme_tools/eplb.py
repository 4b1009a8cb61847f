"""`trireme eplb`: what maps of experts would do for recorded loads, and what a live server's are. Decides nothing of a server's."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from trireme.core.refusal import Refusal
from trireme.engine.eplb_file import read
from trireme.engine.placing import Policy, Slots, balance, peak, place, rank_loads, received, trivial
from trireme.models.cost import Kind, layer_params
from trireme.models.spec import read_spec
from trireme_tools import rebalance

_MIB = 1 << 20


def build() -> typer.Typer:
    app = typer.Typer(help="Balancing of experts (EPLB): try maps on recorded loads, look at a live server's.", no_args_is_help=True)
    app.command()(simulate)
    app.command()(show)
    app.command()(rebalance.bench)
    return app


def simulate(
    dump: Annotated[Path, typer.Argument(help="Loads that the model `eplb` recorded, or its saved state.")],
    *,
    slots: Annotated[int, typer.Option(help="Slots of a layer: its experts and the redundant ones.", min=1)],
    ranks: Annotated[int, typer.Option(help="Ranks along ep.", min=1)],
    policy: Annotated[Policy, typer.Option(help="How experts are placed.")] = "auto",
    groups: Annotated[int, typer.Option(help="Groups of experts, where a router picks groups first.", min=1)] = 1,
    nodes: Annotated[int, typer.Option(help="Hosts of the ranks.", min=1)] = 1,
    model: Annotated[Path | None, typer.Option(help="Checkpoint, for the bytes of an expert.")] = None,
    expert_bytes: Annotated[int | None, typer.Option(help="Bytes of an expert, where no checkpoint says them.", min=1)] = None,
    output: Annotated[Path, typer.Option(help="Where to draw the loads of ranks before and after.")] = Path("build/eplb/simulated.png"),
) -> None:
    """Place the experts of recorded loads. Before: the map that the file has, or every expert once, in order. The gain is what the
    busiest rank has less, over all recorded windows."""
    if model is not None:
        expert_bytes = _expert_bytes(model)
    layers = [
        _simulate(name, windows, had, Slots(windows.shape[1], slots, ranks, groups, nodes), policy) for name, windows, had in _layers(dump)
    ]
    table = Table("layer", "balance before", "after", "gain", "experts moved")
    if expert_bytes is not None:
        table.add_column("MiB moved", justify="right")
    for layer in [*layers, _mean(layers)]:
        size = [f"{layer.moved * expert_bytes / _MIB:.1f}"] if expert_bytes is not None else []
        table.add_row(layer.name, f"{layer.before:.3f}", f"{layer.after:.3f}", f"{layer.gain:.1%}", str(layer.moved), *size)
    console = Console()
    console.print(table)
    panels = {
        "before": np.stack([layer.ranks_before for layer in layers]),
        f"after: {policy}": np.stack([layer.ranks_after for layer in layers]),
    }
    _draw(console, panels, [layer.name for layer in layers], output)


def show(
    url: Annotated[str, typer.Argument(help="A server's HTTP address.")] = "http://localhost:8000",
    *,
    model: Annotated[str, typer.Option(help="The service's model name.")] = "eplb",
    raw: Annotated[bool, typer.Option("--json", help="All that the service says, as JSON.")] = False,
    output: Annotated[Path, typer.Option(help="Where to draw the loads of ranks.")] = Path("build/eplb/live.png"),
) -> None:
    """Show a live server's maps: balance of each layer, versions, and the loads of ranks as they are and as they would be if no
    expert had moved. What a move saves is predicted, as a part of the time of the busiest rank's experts, and so is the part that
    reading the weights of its slots takes in any case: all of it in decodes of few rows, where a move saves nothing."""
    seen = ask(url, model)
    if raw:
        print(json.dumps(seen, indent=1))
        return
    console, panels, names = Console(), {"no expert moved": [], "as it is": []}, []
    for stage in seen["stages"]:
        console.print(_headline(stage))
        lasts = (f"last\n{number}" for number in (10, 100, 1000))
        table = Table("layer", *lasts, "rows", "busiest rank\nover mean", "a move\nsaves", "reading\nweights")
        slots = Slots(stage["num_experts"], stage["num_slots"], stage["num_ranks"])
        for layer in stage["layers"]:
            loads, map_ = np.array(layer["loads"]), layer["map"]
            ranks = rank_loads(np.array(map_), loads, slots) if map_ is not None else np.zeros(slots.num_ranks)
            busiest = f"{ranks.argmax()}: {ranks.max() / ranks.mean():.2f} x" if ranks.any() else ""
            judged = ("" if layer[name] is None else f"{layer[name]:.0%}" for name in ("gain", "reading"))
            balances = (_figure(layer["balance"][last]) for last in ("10", "100", "1000"))
            table.add_row(layer["layer"], *balances, str(loads.sum()), busiest, *judged)
            names.append(f"{stage['stage']}: {layer['layer']}" if len(seen["stages"]) > 1 else layer["layer"])
            panels["no expert moved"].append(rank_loads(trivial(slots), loads, slots))
            panels["as it is"].append(ranks)
        if stage["layers"]:
            console.print(table)
    if names:
        _draw(console, {title: np.stack(rows) for title, rows in panels.items()}, names, output)


def ask(url: str, model: str = "eplb", query: str = "state") -> dict[str, Any]:
    """What the service answers to a query; Refusal with its sentence."""
    body = json.dumps({"query": query}).encode()
    request = urllib.request.Request(f"{url.rstrip('/')}/v2/models/{model}/generate", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(json.load(answer)["text_output"])
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        raise Refusal(f"{model} at {url} refused", why=text, fix="serve with --eplb, or name the service with --model") from None
    except OSError as error:
        fix = "is a server up? `trireme serve` starts one"
        raise Refusal(f"no answer from {url}", why=str(error), fix=fix, kind="unavailable") from None


class _Layer(NamedTuple):
    name: str
    before: float
    after: float
    gain: float
    moved: int  # experts that ranks receive
    ranks_before: np.ndarray
    ranks_after: np.ndarray


def _layers(dump: Path) -> list[tuple[str, np.ndarray, np.ndarray | None]]:
    """(name, loads [windows, experts], map or None) of each layer in a file."""
    contents, found = read(dump), []
    stages = sorted({int(name.split(".")[0].removeprefix("stage_")) for name in contents.arrays})
    for stage in stages:
        loads = contents.stage(stage, "loads")
        loads = contents.stage(stage, "recent") if loads is None else loads
        if loads is None or not loads.any():
            continue
        windows, maps = loads if loads.ndim == 3 else loads[None], contents.stage(stage, "maps")
        for layer in range(windows.shape[1]):
            name = f"{stage}: {layer}" if len(stages) > 1 else str(layer)
            found.append((name, windows[:, layer], None if maps is None else maps[layer]))
    if not found:
        raise Refusal(f"{dump} has no loads", why="nothing was pushed when it was written", fix="record while requests run, then dump")
    return found


def _simulate(name: str, windows: np.ndarray, had: np.ndarray | None, slots: Slots, policy: Policy) -> _Layer:
    slots.check()
    plain = slots._replace(num_slots=slots.num_experts)
    before, at = trivial(slots), slots
    if had is not None and len(had) == slots.num_slots:
        before = had
    elif slots.num_experts % slots.num_ranks == 0:
        before, at = trivial(plain), plain
    current = before if at == slots else trivial(slots)
    after, loads = place(policy, windows, slots, current), windows.sum(axis=0)
    busiest = peak(before, windows, at)
    return _Layer(
        name,
        balance(before, loads, at),
        balance(after, loads, slots),
        1 - peak(after, windows, slots) / busiest if busiest else 0.0,
        int(received(current, after, slots).sum()),
        rank_loads(before, loads, at),
        rank_loads(after, loads, slots),
    )


def _mean(layers: list[_Layer]) -> _Layer:
    """All layers as one: means, and what moves in all; of the gain, what all busiest ranks have less."""
    before = sum(layer.ranks_before.max() for layer in layers)
    gain = sum(layer.ranks_before.max() * layer.gain for layer in layers) / before if before else 0.0
    was, now = (float(np.mean(each)) for each in zip(*((layer.before, layer.after) for layer in layers), strict=True))
    return _Layer("all", was, now, gain, sum(layer.moved for layer in layers), np.zeros(0), np.zeros(0))


def _expert_bytes(model: Path) -> int:
    spec = read_spec(model)
    if not any(spec.sparse):
        raise Refusal(f"{model} has no experts", why=f"{spec.family} is dense", fix="name the checkpoint that the loads are of")
    return layer_params(spec, Kind(sparse=True)).expert * spec.item_bytes


def _headline(stage: dict[str, Any]) -> str:
    words = [f"stage {stage['stage']}", f"maps of version {stage['version']}", f"changed {stage['age_s']:.0f} s ago"]
    words += [
        f"{stage['moved_bytes'] / _MIB:.1f} MiB moved",
        f"{stage['stalled_s'] * 1e3:.1f} ms stalled",
        f"self-test {stage['self_test']}",
    ]
    if stage["num_faults"]:
        words.append(f"{stage['num_faults']} fault(s), the last: {stage['last_fault']}")
    return "; ".join(words)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _draw(console: Console, panels: dict[str, np.ndarray], names: list[str], path: Path) -> None:
    from trireme_tools.plots import plot_heat

    path.parent.mkdir(parents=True, exist_ok=True)
    plot_heat(panels, names, path)
    console.print(f"written: {path}")
