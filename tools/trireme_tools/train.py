"""`trireme train`: a small Qwen3.5-MoE with a head that drafts, from scratch on word problems in arithmetic. Minutes on one GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from trireme.core.refusal import Refusal


def train(
    output: Annotated[Path, typer.Argument(help="Checkpoint to write.")],
    *,
    force: Annotated[bool, typer.Option("--force", help="Write over a checkpoint that is there.")] = False,
    minutes: Annotated[float, typer.Option(help="How long it learns; the rate falls to zero at the end.", min=0.01)] = 7.0,
    batch_size: Annotated[int, typer.Option(help="Problems of a step.", min=1)] = 512,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 3e-3,
    evaluate_every_s: Annotated[float, typer.Option(help="Seconds from one checkpoint, and its score, to the next.")] = 60.0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is a GPU.")] = "auto",
    seed: int = 0,
) -> None:
    """Train the small model on generated word problems; writes a checkpoint, and a log of how it went beside it."""
    if (output / "config.json").exists() and not force:
        raise Refusal(f"{output} is a checkpoint already", why="this would write over it", fix="name another folder, or add --force")
    import torch  # the other verbs do without

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal("no GPU here", why="torch finds none", fix="leave out --device, or say cpu and wait for hours")
    # transformers must not pick up flash-linear-attention: its backward refuses Hopper with Triton 3.4 to 3.7.0 (its issue 640)
    sys.modules["fla"] = None  # type: ignore[assignment]
    from trireme_tools.learning import Recipe, learn

    recipe = Recipe(seed=seed, minutes=minutes, batch_size=batch_size, learning_rate=learning_rate, evaluate_every_s=evaluate_every_s)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("first step", total=1.0)

        def show(entry: dict[str, Any]) -> None:
            progress.update(task, completed=entry["progress"], description=f"step {entry['step']}, loss {entry['loss']:.3f}")
            if "exact_match" in entry:
                console.print(json.dumps(entry), soft_wrap=True, highlight=False)

        learn(recipe, output, device, show)
    console.print(f"written: {output}")
