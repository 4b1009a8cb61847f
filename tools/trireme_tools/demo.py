"""`trireme demo`: what `make demo` shows. The demo model behind a real tritonserver: a streamed chat, curl, Python, and a clean stop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

from rich.console import Console
from rich.syntax import Syntax

from trireme_tools.chat import answer
from trireme_tools.fetch_demo import fetch_demo
from trireme_tools.home import project_home
from trireme_tools.serve import backend_directory, ready_line, settings_of
from trireme_tools.server_home import Ports, find_server
from trireme_tools.supervisor import Supervisor

_QUESTION = "What is the capital of France, and what is it known for?"

_CURL = """\
curl -s http://127.0.0.1:{http}/v2/models/llm/generate -d '{{
  "messages": "[{{\\"role\\": \\"user\\", \\"content\\": \\"Name a fruit.\\"}}]",
  "max_tokens": 32, "temperature": 0}}'"""

_PYTHON = """\
import queue
import numpy as np
import tritonclient.grpc as grpc

def tensor(name, kind, value):
    made = grpc.InferInput(name, [1], kind)
    dtype = object if kind == "BYTES" else bool
    made.set_data_from_numpy(np.array([value], dtype))
    return made

client = grpc.InferenceServerClient("127.0.0.1:{grpc}")
answers = queue.Queue()
client.start_stream(lambda result, error: answers.put((result, error)))
inputs = [
    tensor("text_input", "BYTES", "Water boils at"),
    tensor("stream", "BOOL", True),
    tensor("sampling_parameters", "BYTES",
           '{{"max_tokens": 24, "temperature": 0}}'),
]
client.async_stream_infer("llm", inputs,
                          enable_empty_final_response=True)
final = False
while not final:
    result, error = answers.get()
    if error:
        raise error
    response = result.get_response()
    if response.outputs:
        text = result.as_numpy("text_output")[0].decode()
        print(text, end="", flush=True)
    final = response.parameters["triton_final_response"].bool_param
client.stop_stream()
print()"""


def demo() -> None:
    """Set up the demo model, serve it over two stages, stream an answer, show how to query it, stop."""
    console = Console()
    fetch_demo()
    began, log = time.monotonic(), backend_directory().parent / "demo.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file, console.status("starting tritonserver") as status:
        supervisor = Supervisor(
            find_server(),
            repository=project_home() / "model_repository",
            settings=settings_of(None, {}),
            backend_dir=backend_directory(),
            log=file,
            news=lambda reason: status.update(f"starting tritonserver: {reason}"),
        )
        with supervisor:
            status.stop()
            console.print(ready_line(supervisor, time.monotonic() - began), style="green", highlight=False)
            console.print(f"its log: {log}\n", style="dim", highlight=False)
            _show(console, supervisor.ports)
            status.update("stopping")
            status.start()
    console.print("[green]stopped clean.[/green] `make serve` keeps it running; `.venv/bin/trireme chat` talks to it.")


def _show(console: Console, ports: Ports) -> None:
    console.print(f"[bold cyan]you ›[/bold cyan] {_QUESTION}")
    messages = [{"role": "user", "content": _QUESTION}]
    asyncio.run(answer(console, f"{ports.address}:{ports.grpc}", messages, [], temperature=0.0, max_tokens=96))
    for title, code, lexer, argv in (
        ("with curl", _CURL, "bash", ["bash", "-c"]),
        ("with Python", _PYTHON, "python", [sys.executable, "-c"]),
    ):
        text = code.format(http=ports.http, grpc=ports.grpc)
        console.print(f"\n[bold]{title}[/bold]")
        console.print(Syntax(text, lexer, background_color="default", word_wrap=False))
        console.print("[dim]answers[/dim]")
        subprocess.run([*argv, text], check=True, timeout=120)
