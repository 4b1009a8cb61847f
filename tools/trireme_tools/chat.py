"""`trireme chat`: a conversation with a running front, in the terminal. The front keeps no history; this does."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

import typer
from rich.console import Console

from trireme.core.refusal import Refusal
from trireme_tools.client import Client

_HELP = "[dim]/reset starts anew, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer[/dim]"


def chat(
    url: Annotated[str, typer.Option(help="The server's gRPC address.")] = "127.0.0.1:8001",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy (default: the checkpoint's).")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
) -> None:
    """Talk to a running server in the terminal."""
    console = Console()
    console.print(_HELP)
    first = [{"role": "system", "content": system}] if system else []
    messages, settings = list(first), {"max_tokens": max_tokens} | ({} if temperature is None else {"temperature": temperature})
    while True:
        try:
            text = console.input("[bold cyan]you ›[/bold cyan] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            messages = list(first)
        elif text:
            messages.append({"role": "user", "content": text})
            messages += _turn(console, url, messages, settings)


def _turn(console: Console, url: str, messages: list[dict[str, str]], settings: dict[str, Any]) -> list[dict[str, str]]:
    """One answer, shown as it comes: the message to keep, or none where the server refused."""
    said: list[str] = []
    try:
        asyncio.run(answer(console, url, messages, said, **settings))
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]")
    except Refusal as refusal:
        console.print(f"[red]{refusal}[/red]", highlight=False)
        messages.pop()
        return []
    return [{"role": "assistant", "content": "".join(said)}]


async def answer(console: Console, url: str, messages: list[dict[str, str]], said: list[str], **settings: Any) -> str | None:
    """Streams the answer to `messages` onto the console and into `said`; why it ended."""
    reason = None
    console.print("[bold green]llm ›[/bold green] ", end="")
    async with Client(url) as client:
        async for response in client.stream(messages=json.dumps(messages), stream=True, return_finish_reason=True, **settings):
            piece = "".join(response.get("text_output", []))
            said.append(piece)
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            reason = (response.get("finish_reason") or [reason])[-1]
    console.print(" [dim](cut at max_tokens)[/dim]" if reason == "length" else "")
    return reason
