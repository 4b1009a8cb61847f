"""What `trireme plan` found, as tables in the terminal or as JSON. Decides nothing."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from trireme.models.forecast import RankBytes
from trireme.models.hardware import GIB, MIB, Device
from trireme.models.planner import Option, Refused, Survey
from trireme.models.schedule import schedule_of
from trireme.models.spec import Spec

_PIPED_WIDTH = 140  # columns where there is no terminal


def show(spec: Spec, device: Device, found: Survey, limit: int) -> None:
    """The best plans, those refused by reason, and the best one rank by rank and seam by seam."""
    console, best = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH), found.options[0]
    options = found.folded()
    console.print(_plans(device, options[:limit]))
    if not best.forecast.fits:
        console.print(f"No plan fits; {best.plan} comes nearest.")
    elif best.forecast.redundant_s > 0:
        took = f"{1e3 * best.forecast.redundant_s:.1f} of {1e3 * best.forecast.decode_s:.1f} ms"
        console.print(f"{best.plan}: reading redundant experts takes {took} between two tokens, which evenness of rows must bring back.")
    if len(options) > limit:
        console.print(f"{len(options) - limit} more with --limit, every variant with --json.", style="dim")
    if found.refused:
        console.print(_refused(found.refused))
    console.print(_ranks(best))
    console.print(_collectives([schedule_of(spec, best.plan, stage) for stage in range(best.plan.pp)]))


def as_json(spec: Spec, device: Device, found: Survey) -> str:
    best = found.options[0].plan
    report = {
        "note": "times are predictions from a data sheet and assumptions, not measurements",
        "device": asdict(device),
        "demand": found.options[0].forecast.demand._asdict(),
        "plans": [_option(option) for option in found.options],
        "refused": [_refusal(refused) for refused in found.refused],
        "schedule_of_first": {f"stage_{stage}": schedule_of(spec, best, stage) for stage in range(best.pp)},
    }
    return json.dumps(report, indent=2)


def fold(schedule: list[str]) -> list[tuple[str, str, str, int]]:
    """A schedule as (regime, block, collectives, how often), alike lines of many layers as one at the place of the first."""
    counts: Counter[tuple[str, str, str]] = Counter()
    regime = ""
    for line in schedule:
        if line.startswith(" "):
            block, collectives = line.split(maxsplit=1)
            counts[regime, re.sub(r"\.\d+\.", ".*.", block), collectives] += 1
        else:
            regime = line
    return [(*row, count) for row, count in counts.items()]


def _plans(device: Device, options: list[Option]) -> Table:
    demand, reach = options[0].forecast.demand, device.reach
    table = Table(
        title=f"{options[0].plan.world} x {device.name} of {device.memory_bytes / GIB:.0f} GiB, "
        f"{demand.requests} requests of {demand.prompt} + {demand.output} tokens",
        caption="Bytes are of the fullest rank, exact but for activations. Times are predictions from the data sheet, reaching "
        f"{reach.flops:.0%} of its FLOPs, {reach.bandwidth:.0%} of its bandwidth, {reach.link:.0%} of its link; "
        f"{reach.memory:.0%} of memory is used.",
    )
    table.add_column("plan")
    keeps_states = any(option.forecast.state_bytes for option in options)
    mails = any(option.forecast.fullest.mailbox for option in options)
    sizes = ("weights\nGiB", "activations\nGiB", *["mail\nGiB"] * mails, *["state of a\nsequence, MiB"] * keeps_states)
    for name in (*sizes, "capacity\ntokens", "\nrequests", "prefill\ns", "decode\nms", "\ntokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for option in options:
        rank, predicted = option.forecast.fullest, option.forecast
        state = [f"{predicted.state_bytes / MIB:.1f}"] * keeps_states
        mail = [f"{rank.mailbox / GIB:.1f}"] * mails
        cells = str(option.plan), f"{rank.weights / GIB:.1f}", f"{rank.activations / GIB:.1f}", *mail, *state
        if predicted.fits:
            times = f"{predicted.prefill_s:.2f}", f"{1e3 * predicted.decode_s:.1f}", f"{predicted.tokens_per_s:.0f}"
            table.add_row(*cells, f"{predicted.capacity_tokens}", f"{predicted.capacity_requests}", *times)
        else:
            table.add_row(*cells, f"lacks {predicted.missing_bytes / GIB:.1f} GiB", "0", "", "", "", style="dim")
    return table


def _refused(refused: tuple[Refused, ...]) -> Table:
    """One line for each reason, with the first plan that has it."""
    table = Table(title="Refused")
    for name in ("plan", "alike", "why", "nearest legal plan"):
        table.add_column(name)
    by_reason: dict[str, list[Refused]] = {}
    for each in refused:
        by_reason.setdefault(each.refusal.why, []).append(each)
    for reason, alike in by_reason.items():
        first = alike[0]
        table.add_row(str(first.sizes), str(len(alike) - 1 or ""), f"{first.refusal.what}: {reason}", str(first.nearest or "none"))
    return table


def _ranks(option: Option) -> Table:
    """Neighbours that hold the same are one line."""
    table = Table(title=f"{option.sizes}: GiB of each rank")
    for name in ("stage", "layers", "ranks", "weights", "activations", "mail", "states", "left for\nkeys and values", "tokens\nthere"):
        table.add_column(name, justify="right")
    usable, requests = option.forecast.usable_bytes, option.forecast.concurrent
    for alike, group in groupby(option.forecast.ranks, key=lambda rank: rank._replace(rank=0)):
        numbers = [rank.rank for rank in group]
        states = requests * alike.per_request
        left = usable - alike.fixed - states
        sizes = (f"{size / GIB:.2f}" for size in (alike.weights, alike.activations, alike.mailbox, states, left))
        layers = _span(option.plan.layers(alike.stage))
        tokens = str(alike.tokens(usable, requests)) if alike.kv_per_token else "any"
        table.add_row(str(alike.stage), layers, _span(range(numbers[0], numbers[-1] + 1)), *sizes, tokens)
    return table


def _collectives(schedules: list[list[str]]) -> Table:
    """Of each stage, in the regimes that steps may name."""
    table = Table(title="Collectives before each block and inside")
    for name in ("stage", "regime", "block", "collectives", "times"):
        table.add_column(name, justify="right" if name == "times" else "left")
    for stage, schedule in enumerate(schedules):
        for regime, block, collectives, count in fold(schedule):
            table.add_row(str(stage), regime, block, collectives, str(count))
    return table


def _span(numbers: range) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"


def _option(option: Option) -> dict[str, Any]:
    predicted = option.forecast
    return {
        "options": str(option.sizes),
        **option.sizes._asdict(),
        "layer_cut": option.plan.layer_cut,
        "fits": predicted.fits,
        "missing_bytes": predicted.missing_bytes,
        "capacity_tokens": predicted.capacity_tokens,
        "capacity_requests": predicted.capacity_requests,
        "state_bytes_per_sequence": predicted.state_bytes,
        "predicted_prefill_s": predicted.prefill_s,
        "predicted_decode_s": predicted.decode_s,
        "predicted_redundant_s": predicted.redundant_s,
        "predicted_tokens_per_s": predicted.tokens_per_s,
        "ranks": [_rank(rank) for rank in predicted.ranks],
    }


def _rank(rank: RankBytes) -> dict[str, int]:
    return {
        "stage": rank.stage,
        "rank": rank.rank,
        "weights_bytes": rank.weights,
        "activations_bytes": rank.activations,
        "mailbox_bytes": rank.mailbox,
        "kv_bytes_per_token": rank.kv_per_token,
        "state_bytes": rank.state,
        "held_bytes": rank.held,
    }


def _refusal(refused: Refused) -> dict[str, Any]:
    return {
        "options": str(refused.sizes),
        **refused.sizes._asdict(),
        "what": refused.refusal.what,
        "why": refused.refusal.why,
        "fix": refused.refusal.fix,
        "nearest": str(refused.nearest) if refused.nearest else None,
    }
