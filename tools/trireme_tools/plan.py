"""`trireme plan`: the ways to spread a checkpoint over devices, what fits, and why the rest does not. Needs no weights, no device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings, make_settings
from trireme.models.forecast import Demand
from trireme.models.hardware import DEVICES, GIB, Device
from trireme.models.planner import SETTINGS, Sizes, nearest, survey
from trireme.models.spec import ITEM_BYTES, Spec, read_spec
from trireme.parallel.plan import Plan
from trireme_tools.plan_report import as_json, show
from trireme_tools.settings_options import settings_options_of
from trireme_tools.support_matrix import read_results, support_matrix

_CONTEXT = 8192  # tokens of a request where nobody says and the checkpoint has as many


@settings_options_of(*SETTINGS.values(), "layer_cut", "dtype", "max_num_batched_tokens", "link", "mtp.num_tokens")
def plan(
    model: Annotated[Path | None, typer.Argument(help="Checkpoint directory, or a config.json alone.")] = None,
    *,
    gpus: Annotated[int | None, typer.Option(help="Devices, all in use (default: as many as --pp, --tp and --cp make).", min=1)] = None,
    gpu: Annotated[str, typer.Option(help=f"Their kind: {', '.join(DEVICES)}.")] = "H100",
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of each (default: the kind's).", min=0.001)] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a request, prompt and answer (default: at most 8192).", min=2)] = None,
    output: Annotated[int | None, typer.Option(help="Tokens of its answer (default: an eighth of them).", min=1)] = None,
    requests: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 64,
    limit: Annotated[int, typer.Option(help="Plans to show.", min=1)] = 10,
    json: Annotated[bool, typer.Option("--json", help="Everything that was looked at, as JSON.")] = False,
    matrix: Annotated[bool, typer.Option("--matrix", help="In place of plans: families and parallel forms, as Markdown.")] = False,
    results: Annotated[Path | None, typer.Option(help="With --matrix: the JSON file that tests of plans wrote.")] = None,
    chosen: dict[str, Any],
) -> None:
    """List the plans that a checkpoint can run under, with their bytes and predicted times. Sizes that you name are kept."""
    if matrix:
        print(support_matrix(read_results(results) if results is not None else []))
        return
    if model is None:
        raise Refusal("no model is named", why="a plan is made for a checkpoint", fix="name its directory or its config.json")
    spec = read_spec(model)
    settings, fixed = _read(model, chosen)
    device, demand = _device(gpu, gpu_memory), _demand(spec, context, output, requests)
    item_bytes = _item_bytes(settings, spec, device)
    named = Sizes(**fixed)
    num_gpus = gpus or named.pp * named.tp * named.cp
    if "tp" not in fixed and num_gpus % (named.pp * named.cp) == 0:
        named = named._replace(tp=num_gpus // (named.pp * named.cp))

    found = survey(spec, settings, num_gpus, device, demand, item_bytes, fixed)
    if not found.options:
        others = survey(spec, msgspec.structs.replace(settings, layer_cut=None), num_gpus, device, demand, item_bytes)
        refusal = found.refused[0].refusal if found.refused else _why_none(named, settings, spec, num_gpus)
        near = nearest(named, others.options)
        raise Refusal(refusal.what, why=refusal.why, fix=f"{refusal.fix}; the nearest legal plan is {near}" if near else refusal.fix)
    if json:
        print(as_json(spec, device, found))
    else:
        show(spec, device, found, limit)


def _read(model: Path, chosen: dict[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """(what all plans have in common, the Sizes that the user named)."""
    short = {setting: name for name, setting in SETTINGS.items()}
    fixed = {short[setting]: value for setting, value in chosen.items() if setting in short}
    common = {name: value for name, value in chosen.items() if name not in short}
    if "sp" in fixed:
        common["sequence_parallel"] = fixed["sp"]
        fixed["sp"] = fixed["sp"] != "off"
    if "layer_cut" in common:
        fixed.setdefault("pp", len(common["layer_cut"]))
        common["pipeline_parallel_size"] = fixed["pp"]
    return make_settings({"model": str(model), **common}), fixed


def _device(kind: str, gib: float | None) -> Device:
    if kind not in DEVICES:
        raise Refusal(f"no data sheet of {kind!r}", why=f"known are {', '.join(DEVICES)}", fix="name the nearest, and its --gpu-memory")
    return DEVICES[kind] if gib is None else replace(DEVICES[kind], memory_bytes=int(gib * GIB))


def _demand(spec: Spec, context: int | None, output: int | None, requests: int) -> Demand:
    most = spec.max_position_embeddings
    context = context or min(_CONTEXT, most)
    output = output or max(1, context // 8)
    if context > most:
        raise Refusal(f"--context {context}", why=f"the checkpoint has positions for {most} tokens", fix=f"use --context {most}")
    if output >= context:
        raise Refusal(f"--output {output} of --context {context}", why="a request has a prompt too", fix="give a smaller --output")
    return Demand(context, requests, output)


def _item_bytes(settings: Settings, spec: Spec, device: Device) -> int:
    """As ranks choose it: auto is float32 on a CPU, else the checkpoint's."""
    if settings.dtype == "auto":
        return 4 if device.name == "CPU" else spec.item_bytes
    return ITEM_BYTES[settings.dtype]


def _why_none(named: Sizes, settings: Settings, spec: Spec, num_gpus: int) -> Refusal:
    """Of sizes that no plan of so many devices has: what the validator says of them, or that they are of other devices."""
    try:
        Plan.of(named.settings(settings), spec)
    except Refusal as refusal:
        return refusal
    return Refusal(
        f"no plan of {num_gpus} devices has {named}",
        why="pp * tp * cp is the number of devices, sp cuts along a tp, and experts are dispatched along an ep",
        fix="name other sizes, or fewer of them",
    )
