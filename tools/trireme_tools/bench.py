"""`trireme bench`: load on a running server, or the engine alone (--offline), with JSON and a plot; or the ops alone (--ops)."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.models.spec import read_spec
from trireme.parallel.plan import Plan
from trireme.serve.metrics import METRICS_PERIOD_S
from trireme.serve.text import Text
from trireme_tools.load import drive, summary
from trireme_tools.profiler import Profiler, as_json, show
from trireme_tools.progress import progress_bar
from trireme_tools.scrape import between, read_page
from trireme_tools.settings_options import override, settings_options
from trireme_tools.workload import Ask, arrivals, make_workload, seqs256, word_problems


@settings_options
def bench(
    *,
    model: Annotated[Path | None, typer.Option(help="Checkpoint (default: the project's).")] = None,
    url: Annotated[str, typer.Option(help="gRPC address of the running server.")] = "127.0.0.1:8001",
    metrics_url: Annotated[
        str, typer.Option(help="The server's own metrics, read before and after; '' for none.")
    ] = "http://127.0.0.1:8002/metrics",
    offline: Annotated[bool, typer.Option(help="No server: the engine in this process.")] = False,
    workload: Annotated[
        Literal["lengths", "seqs256", "problems"],
        typer.Option(help="seqs256: 256 prompts, in and out 100-1024; problems: the word problems of `trireme eval`."),
    ] = "lengths",
    requests: Annotated[int, typer.Option(help="How many requests.", min=1)] = 32,
    input_len: Annotated[str, typer.Option(help="Prompt tokens, as 64 or 32-128.")] = "64",
    output_len: Annotated[str, typer.Option(help="Output tokens, as 64 or 32-128.")] = "64",
    concurrency: Annotated[int, typer.Option(help="Requests at once; also the peer's batch size.", min=1)] = 8,
    rate: Annotated[float | None, typer.Option(help="Requests a second (Poisson), in place of --concurrency.", min=0.001)] = None,
    peer: Annotated[Literal["transformers"] | None, typer.Option(help="Measure it on the same prompts, after ours.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    decode: Annotated[str, typer.Option(help="Offline: only the time of a decode step of so many sequences, as 1,32,256.")] = "",
    drafts: Annotated[str, typer.Option(help="Offline: the load once with each of so many MTP drafts, side by side, as 0,1,2,4.")] = "",
    prefill: Annotated[
        str, typer.Option(help="Offline: only the time to the first token, of one prompt or of several, as 1024,32768,32x1024.")
    ] = "",
    plot: Annotated[
        str, typer.Option(help="Only draw what --prefill or --decode wrote, several plans in one picture, as one.json,tp2.json.")
    ] = "",
    profile: Annotated[
        bool, typer.Option(help="With --decode or --prefill: also what some steps are made of on each rank's device, by kernels.")
    ] = False,
    seed: int = 0,
    ops: Annotated[bool, typer.Option(help="Only the kernels, on shapes of real models, against what this machine can do.")] = False,
    op: Annotated[str | None, typer.Option(help="With --ops: this one alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --ops: JSON in place of a table.")] = False,
    output: Annotated[Path, typer.Option(help="Where to write NAME.json and NAME.png.")] = Path("build/bench/bench"),
    chosen: dict[str, Any],
) -> None:
    """Measure time to first token, inter-token latency and throughput."""
    if ops:
        from trireme_tools.ops_bench import bench_ops

        bench_ops(op, as_json)
        return
    if plot:
        _plot([Path(each) for each in plot.split(",")], output)
        return
    from trireme_tools.serve import settings_of

    settings, console = settings_of(model, chosen), Console(stderr=True)
    if decode or prefill:
        profiler = Profiler() if profile else None
        if decode:
            _bench_decode(settings, _counts(decode), _count(input_len), _count(output_len), profiler, output)
        else:
            _bench_prefill(settings, prefill, profiler, output)
        return
    if profile:
        raise Refusal("nothing is profiled", why="windows are of steps that are alike", fix="add --decode 1,256 or --prefill 32x1024")
    asks = _asks(workload, requests, input_len, output_len, Path(settings.model), seed)
    asks = [replace(ask, temperature=temperature) for ask in asks]
    if drafts:
        _bench_drafts(settings, asks, _counts(drafts), concurrency, console, output)
        return
    report: dict[str, Any] = {"workload": _describe(asks)}
    with progress_bar(console, "trireme", len(asks)) as tick:
        if offline:
            from trireme_tools.offline import measure

            records, seconds, report["acceptance_length"] = measure(settings, asks, concurrency, tick)
        else:
            before = read_page(metrics_url) if metrics_url else {}
            records, seconds = drive(url, asks, arrivals(len(asks), rate, seed), None if rate else concurrency, tick)
            if metrics_url:
                time.sleep(METRICS_PERIOD_S * 1.5)  # the page is that far behind
                report["server"] = between(before, read_page(metrics_url), seconds)
    report["trireme"] = summary(records, seconds)
    report["failures"] = sorted({record.error for record in records if record.error})
    if peer:
        from trireme_tools.peer import generate_batches

        with progress_bar(console, peer, len(asks)) as tick:
            report[peer] = generate_batches(settings.model, asks, concurrency, tick)
        report["speedup"] = report["trireme"]["output_tokens_per_s"] / report[peer]["output_tokens_per_s"]
    _save(output, report, records)
    _show(Console(), report, output)
    if report["failures"]:
        raise Refusal(f"{report['trireme']['failed']} requests failed", why=report["failures"][0], kind="internal")


def _asks(workload: str, requests: int, input_len: str, output_len: str, model: Path, seed: int) -> list[Ask]:
    if workload == "problems":
        text = Text.read(model)
        if text is None:
            raise Refusal(f"{model} has no tokenizer.json", why="word problems are text", fix="measure with --workload lengths")
        return word_problems(requests, text.encode)
    vocab_size = read_spec(model).vocab_size
    return seqs256(vocab_size) if workload == "seqs256" else make_workload(requests, input_len, output_len, vocab_size, seed)


def _bench_drafts(settings: Settings, asks: Sequence[Ask], drafts: Sequence[int], concurrency: int, console: Console, output: Path) -> None:
    from trireme_tools.offline import measure

    title = f"{len(asks)} requests, {concurrency} at once"
    table = Table("drafts", "output tokens/s", "ratio", "inter-token latency, ms", "acceptance length", title=title)
    rows: list[dict[str, Any]] = []
    for number in drafts:
        with progress_bar(console, f"{number} drafts", len(asks)) as tick:
            measured = measure(override(settings, {"mtp": {"num_tokens": number}}), asks, concurrency, tick)
        if errors := [record.error for record in measured.records if record.error]:
            raise Refusal(f"{len(errors)} requests failed with {number} drafts", why=errors[0], kind="internal")
        rows.append({"drafts": number, "acceptance_length": measured.acceptance_length, **summary(measured.records, measured.seconds)})
        rate, accepted = rows[-1]["output_tokens_per_s"], measured.acceptance_length
        ratio, latency = rate / rows[0]["output_tokens_per_s"], rows[-1]["itl_ms"]["mean"]
        table.add_row(str(number), f"{rate:.1f}", f"{ratio:.2f}", f"{latency:.2f}", "-" if accepted is None else f"{accepted:.2f}")
    Console().print(table)
    _write(output, {"workload": _describe(asks), "drafts": rows})


def _bench_decode(
    settings: Settings, batches: Sequence[int], input_len: int, output_len: int, profiler: Profiler | None, output: Path
) -> None:
    from trireme_tools.offline import measure_decode

    spec = read_spec(Path(settings.model))
    plan = str(Plan.of(settings, spec))
    steps = measure_decode(settings, batches, input_len, output_len, spec.vocab_size, profiler)
    table = Table("sequences", "decode step, ms", "prompt tokens/s", title=f"{plan}: {input_len} in, {output_len} out, all at once")
    for step in steps:
        table.add_row(str(step.batch), f"{step.step_ms:.2f}", f"{step.batch * input_len / step.first_s:.0f}")
    Console().print(table)
    _write(output, {"plan": plan, "decode": [step._asdict() for step in steps]} | _profiled(profiler))


_PREFILL_RUNS = 5  # of each length


def _bench_prefill(settings: Settings, lengths: str, profiler: Profiler | None, output: Path) -> None:
    from trireme_tools.offline import measure_prefill

    spec = read_spec(Path(settings.model))
    plan = str(Plan.of(settings, spec))
    shapes = [_prompts(text) for text in lengths.split(",")]
    measured, activation_bytes = measure_prefill(settings, shapes, _PREFILL_RUNS, spec.vocab_size, profiler)
    table = Table("prompts", "tokens of each", "to the first token of all, ms", "tokens/s", title=f"{plan}, median of {_PREFILL_RUNS}")
    for each in measured:
        table.add_row(str(each.prompts), str(each.input_len), f"{each.seconds * 1e3:.1f}", f"{each.tokens_per_s:.0f}")
    Console().print(table)
    if any(activation_bytes):
        told = ", ".join(f"{num_bytes / (1 << 20):.0f}" for num_bytes in activation_bytes)
        Console().print(f"activations at the peak of the largest step, MiB of a rank of each stage: {told}")
    rows = [each._asdict() | {"tokens_per_s": each.tokens_per_s} for each in measured]
    most_rows = settings.max_num_batched_tokens
    report = {"plan": plan, "max_num_batched_tokens": most_rows, "activation_bytes": activation_bytes, "prefill": rows}
    _write(output, report | _profiled(profiler))


def _profiled(profiler: Profiler | None) -> dict[str, Any]:
    """What goes into a report, once it is shown; nothing where nothing was profiled."""
    if profiler is None:
        return {}
    show(Console(), profiler.profiles)
    return {"profile": as_json(profiler.profiles)}


def _counts(text: str) -> list[int]:
    """Of "1,32"."""
    return [_count(number) for number in text.split(",")]


def _count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Refusal(f"{text!r} is no number", why="it counts sequences, drafts or tokens", fix="write 32, or several as 1,32") from None


def _prompts(text: str) -> tuple[int, int]:
    """(prompts, tokens of each) of "1024" or "32x1024"."""
    many, _, length = text.rpartition("x")
    try:
        return int(many or 1), int(length)
    except ValueError:
        raise Refusal(
            f"prefill {text!r} is not understood", why="it is a number of tokens, or of prompts and tokens", fix="write 1024 or 32x1024"
        ) from None


def _plot(reports: Sequence[Path], output: Path) -> None:
    from trireme_tools.plots import plot_decode, plot_prefill

    try:
        read = [json.loads(path.read_text()) for path in reports]
    except (OSError, ValueError) as error:
        raise Refusal("a report cannot be read", why=str(error), fix="name files that --prefill or --decode wrote") from None
    kinds = {kind for kind in ("prefill", "decode") if all(kind in report for report in read)}
    if not kinds:
        raise Refusal("these reports are not of one kind", why="all are of --prefill, or all of --decode", fix="name reports of one kind")
    output.parent.mkdir(parents=True, exist_ok=True)
    (plot_prefill if "prefill" in kinds else plot_decode)(read, output.with_suffix(".png"))
    Console().print(f"written: {output.with_suffix('.png')}")


def _describe(asks: Sequence[Ask]) -> dict[str, int]:
    return {
        "requests": len(asks),
        "input_tokens": sum(len(ask.prompt) for ask in asks),
        "output_tokens": sum(ask.num_output for ask in asks),
    }


def _machine() -> dict[str, Any]:
    return {"cores": len(os.sched_getaffinity(0)), "processor": platform.machine(), "when": time.strftime("%Y-%m-%d %H:%M")}


def _write(output: Path, report: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps({"machine": _machine()} | report, indent=2) + "\n")


def _save(output: Path, report: dict[str, Any], records: list) -> None:
    from trireme_tools.plots import plot_load

    _write(output, report)
    plot_load(records, report, output.with_suffix(".png"))


def _show(console: Console, report: dict[str, Any], output: Path) -> None:
    ours = report["trireme"]
    table = Table("", "mean", "p50", "p90", "p99", title=f"{ours['requests']} requests in {ours['seconds']:.1f} s, {ours['failed']} failed")
    for name, title in (("ttft_ms", "time to first token, ms"), ("itl_ms", "inter-token latency, ms"), ("e2e_ms", "whole request, ms")):
        table.add_row(title, *(f"{value:.1f}" for value in ours[name].values()))
    console.print(table)
    rates = [f"{ours[f'{name}_per_s']:.2f} {name.replace('_', ' ')}/s" for name in ("output_tokens", "total_tokens", "requests")]
    console.print(f"trireme: {', '.join(rates)}")
    if "server" in report:
        server = report["server"]
        busy = ", ".join(f"stage_{stage} {share:.0%}" for stage, share in server["stage_busy_share"].items())
        early = sum(server["stage_reordered_steps"].values())
        console.print(f"server: {server['steps_per_s']:.0f} steps/s, {server['rows_per_step']:.1f} rows each; busy {busy}")
        console.print(f"BLS hop {server['bls_hop_ms']:.2f} ms; put in order {early:.0f} steps; {server['preemptions']:.0f} preemptions")
    if "speedup" in report:
        peer, rate = report["transformers"], report["transformers"]["output_tokens_per_s"]
        console.print(f"transformers, batches of {peer['batch_size']}: {rate:.2f} output tokens/s (ratio {report['speedup']:.2f})")
    console.print(f"written: {output.with_suffix('.json')}, {output.with_suffix('.png')}")
