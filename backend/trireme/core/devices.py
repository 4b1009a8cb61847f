"""Devices: which GPU each rank computes on, or none, and what follows from that, from the settings and /dev alone: the front, leaders
and ranks of a host agree, without torch."""

from __future__ import annotations

import os
from pathlib import Path

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings

_DEVICES = Path("/dev")


def num_gpus() -> int:
    """GPUs that this process may use. No driver is asked: that would make a context, or import torch."""
    here = len(list(_DEVICES.glob("nvidia[0-9]*")))
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return here if shown is None else min(here, len([name for name in shown.split(",") if name.strip() not in ("", "-1")]))


def place_ranks(settings: Settings) -> list[list[int]] | None:
    """The GPU of each rank of each stage; None where ranks compute on CPUs. Refusal where a GPU is asked for that is not here.

    Numbers are those that CUDA uses in this process, so $CUDA_VISIBLE_DEVICES chooses among a host's.
    """
    here, needed = num_gpus(), settings.world
    if settings.devices is not None:
        if (most := max(device for stage in settings.devices for device in stage)) >= here:
            raise Refusal(
                f"devices names GPU {most}, and this host has {here}",
                why="GPUs are counted from 0, and each rank needs its own",
                fix=f"name {needed} of those there are, or use fewer ranks" if here else "leave devices out: ranks compute on the CPU",
            )
        return settings.devices
    if settings.device == "cpu" or (settings.device == "auto" and here < needed):
        return None
    if here < needed:
        raise Refusal(
            f"device is cuda, {needed} ranks need a GPU each, and this host has {here}",
            why="two ranks do not share a device",
            fix="use fewer ranks, or device auto, which computes on CPUs where GPUs are too few",
        )
    ranks = settings.ranks_per_stage
    return [list(range(stage * ranks, (stage + 1) * ranks)) for stage in range(settings.num_stages)]


def steps_in_flight(settings: Settings) -> int:
    """Over all stages. One beyond pp hides the front. On GPUs a second hides a busy host too (up to 9 ms of a step, seen on H100s), for
    a row more of each sequence that ends; on CPUs the ranks need the cores that it would keep busy. Refusal as by place_ranks."""
    depth = settings.async_depth
    if depth is None:
        depth = 1 if place_ranks(settings) is None else 2
    return settings.num_stages + depth
