"""Load: settings and a checkpoint on disk to a Runner on its device. What the runner does then is its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from trireme.core.devices import place_ranks
from trireme.core.log import logger
from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.layers.block import Build
from trireme.models.registry import build_stage
from trireme.models.spec import read_spec
from trireme.parallel.plan import Plan
from trireme.ranks.runner import Runner
from trireme.weights.load import fill_dummy, load
from trireme_kernels.choose import Choices


def load_runner(
    settings: Settings,
    stage: int,
    rank: int,
    progress: Callable[[str], None],
    maps: Mapping[int, np.ndarray] | None = None,
    map_version: int = 0,
) -> Runner:
    """A rank's part of the model, ready to run, with the stage's expert maps as they are now. `progress` gets clauses for a user.
    Refusal where it cannot be loaded."""
    torch.set_num_threads(settings.threads(settings.world))
    model_dir = Path(settings.model)
    spec = read_spec(model_dir)
    plan = Plan.of(settings, spec)
    device = _device(settings, stage, rank)
    auto = "float32" if device.type == "cpu" else spec.dtype
    dtype = getattr(torch, auto if settings.dtype == "auto" else settings.dtype)
    choices = Choices(device.type, dtype)
    log = logger(f"stage_{stage} rank {rank}")
    decoder = build_stage(Build(spec, plan, stage, device, dtype, choices, rank=rank, maps=maps or {}, map_version=map_version))
    manifest = fill_dummy(decoder) if settings.load_format == "dummy" else load(decoder, model_dir, _in_percent(progress))
    runner = Runner(
        decoder,
        settings,
        stage,
        device=device,
        dtype=dtype,
        hidden=spec.hidden,
        vocab_size=spec.vocab_size,
        max_model_len=settings.max_model_len or spec.max_position_embeddings,
        choices=choices,
        progress=progress,
    )
    log.info("loaded %s on %s; implementations:\n%s", manifest, device, choices.table())
    kept = f"{runner.num_pages} pages" + ("" if runner.num_snapshots is None else f", {runner.num_snapshots} snapshots")
    log.info("memory %s; %s; graphs: %s", runner.room, kept, runner.graphs)
    return runner


def _device(settings: Settings, stage: int, rank: int) -> torch.device:
    """Where this rank computes, made current. A process sees all GPUs of its host and is told which is its own, since a worker
    of a pool is one rank after another, and CUDA reads what the environment shows only once."""
    placed = place_ranks(settings)
    if placed is None:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Refusal(
            f"torch {torch.__version__} finds no GPU, and this host has one",
            why="it is a build for CPUs, or does not fit the driver",
            fix="install a torch for CUDA where ranks run (TRIREME_PYTHON), or set device to cpu",
        )
    device = torch.device("cuda", placed[stage][rank])
    torch.cuda.set_device(device)
    return device


def _in_percent(progress: Callable[[str], None]) -> Callable[[int, int], None]:
    """Bytes read of bytes to read, told when another tenth is there."""
    told = -1

    def tell(read: int, to_read: int) -> None:
        nonlocal told
        if (tenth := 10 * read // max(1, to_read)) > told:
            told = tenth
            progress(f"is loading weights, {10 * tenth} %")

    return tell
