"""`trireme trace`: the pipeline over time, from a server's step_trace file or a small offline run: Perfetto JSON and a picture."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from trireme.core.refusal import Refusal
from trireme_tools.serve import settings_of
from trireme_tools.settings_options import override, settings_options
from trireme_tools.timeline import Bar, bubble_ratio, chrome_trace, read_bars
from trireme_tools.workload import make_workload


@settings_options
def trace(
    file: Annotated[Path | None, typer.Argument(help="What a server wrote under `step_trace` (default: run a workload here).")] = None,
    *,
    model: Annotated[Path | None, typer.Option(help="Checkpoint of the offline run (default: the project's).")] = None,
    requests: Annotated[int, typer.Option(help="Requests of the offline run.")] = 8,
    output_len: Annotated[str, typer.Option(help="Their output tokens.")] = "24",
    steps: Annotated[str, typer.Option(help="Steps to draw, FIRST-LAST.")] = "0-60",
    output: Annotated[Path, typer.Option(help="Where to write NAME.json and NAME.png.")] = Path("build/trace/trace"),
    chosen: dict[str, Any],
) -> None:
    """Draw which stage worked on which step when, and print each stage's share of idle time."""
    from trireme_tools.plots import plot_pipeline

    console = Console()
    first, last = _span(steps)
    bars = _bars_of(file) if file else _offline(model, requests, output_len, chosen)
    last_epoch = max(bar.epoch for bar in bars)
    bars = [bar for bar in bars if bar.epoch == last_epoch]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(chrome_trace(bars)))
    drawn = [bar for bar in bars if first <= bar.number <= last] or bars
    ratios = bubble_ratio(bars)
    title = f"{len({bar.number for bar in bars})} steps; bubbles {', '.join(f'{ratio:.0%}' for ratio in ratios.values())}"
    plot_pipeline(drawn, output.with_suffix(".png"), title)
    for stage, ratio in ratios.items():
        console.print(f"stage {stage}: bubble ratio {ratio:.3f}")
    console.print(f"written: {output.with_suffix('.json')} (ui.perfetto.dev), {output.with_suffix('.png')}")


def _span(steps: str) -> tuple[int, int]:
    """First and last of "3-60", or of "3"."""
    first, _, last = steps.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()):
        raise Refusal(f"steps {steps!r} are not two numbers", why="they are drawn from the first to the last", fix="write --steps 0-60")
    return int(first), int(last or first)


def _bars_of(file: Path) -> list[Bar]:
    try:
        return read_bars(file.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{file} cannot be read", why=str(error), fix="give the file that step_trace names") from None


def _offline(model: Path | None, requests: int, output_len: str, chosen: dict[str, Any]) -> list[Bar]:
    """Bars of a run in this process: prompts of mixed lengths, so that chunks and decodes share steps."""
    from trireme_tools.offline import measure

    with tempfile.TemporaryDirectory(prefix="trireme-trace-") as folder:
        path = Path(folder) / "steps.jsonl"
        settings = override(settings_of(model, chosen), {"step_trace": str(path)})
        vocab_size = json.loads((Path(settings.model) / "config.json").read_text())["vocab_size"]
        measure(settings, make_workload(requests, "16-256", output_len, vocab_size), requests, lambda count: None)
        return _bars_of(path)
