"""The command `trireme`: every verb, and how a refusal reaches the terminal. The verbs themselves are one file each."""

from __future__ import annotations

import sys

import typer

from trireme.core.refusal import Refusal
from trireme_tools import bench, chat, demo, eplb, evaluate, fetch_demo, generate, plan, repo, serve, trace, train


def build() -> typer.Typer:
    app = typer.Typer(
        name="trireme",
        help="Serve language models over pipeline stages, as models of NVIDIA Triton Inference Server.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # a fault of ours shows a plain traceback
    )
    app.command("fetch-demo")(fetch_demo.fetch_demo)
    app.command("eval")(evaluate.evaluate)
    for verb in (demo.demo, serve.serve, chat.chat, generate.generate, bench.bench, trace.trace, plan.plan, repo.repo, train.train):
        app.command()(verb)
    app.add_typer(eplb.build(), name="eplb")
    app.callback()(_anchor)
    return app


def _anchor() -> None:
    """Serve language models over pipeline stages, as models of NVIDIA Triton Inference Server."""


def main() -> None:
    try:
        build()()
    except Refusal as refusal:
        print(f"trireme: {refusal}", file=sys.stderr)
        sys.exit(2)
