"""`trireme generate`: tokens in, tokens out, by the same engine, ranks and links that serve, without a server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trireme.core.refusal import Refusal
from trireme.core.request import Request
from trireme.core.settings import Settings
from trireme.engine.sampling import Defaults, make_sampling
from trireme.models.spec import read_spec
from trireme_tools.serve import settings_of
from trireme_tools.settings_options import settings_options


@settings_options
def generate(
    *,
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")],
    input_ids: Annotated[str, typer.Option(help='File of JSON lines {"input_ids": [...]}; - for standard input.')],
    json_lines: Annotated[bool, typer.Option("--json", help='Print {"output_ids": [...]} a line; else the ids alone.')] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to make.")] = 16,
    min_tokens: Annotated[int | None, typer.Option(help="No end before so many.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest that sum to p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop what is less likely than p times the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Over prompt and output.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Over the output.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Over the output, by count.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    chosen: dict[str, Any],
) -> None:
    """Complete token prompts of a file; one line of output for each line of input."""
    from trireme_tools.offline import generate as complete

    settings = settings_of(model, chosen)
    values = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "ignore_eos": ignore_eos,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
    }
    given = {name: value for name, value in values.items() if value is not None}
    for tokens in complete(settings, read_requests(settings, input_ids, given)):
        print(json.dumps({"output_ids": tokens}) if json_lines else " ".join(map(str, tokens)))


def read_requests(settings: Settings, name: str, given: dict[str, Any]) -> list[Request]:
    """Requests of the file `name`, each with the sampling values `given`."""
    spec = read_spec(Path(settings.model))
    defaults, limit = Defaults.of(Path(settings.model), settings.default_max_tokens), settings.max_model_len or spec.max_position_embeddings
    requests = []
    for number, line in enumerate(_lines(name), 1):
        if line.strip():
            prompt = _prompt(line, number, spec.vocab_size)
            sampling = make_sampling(given, defaults, vocab_size=spec.vocab_size, prompt_len=len(prompt), max_model_len=limit)
            requests.append(Request(id=str(number), prompt=prompt, sampling=sampling))
    return requests


def _lines(name: str) -> list[str]:
    try:
        return (sys.stdin.read() if name == "-" else Path(name).read_text()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{name} cannot be read", why=str(error), fix="give a file of JSON lines, or - for standard input") from None


def _prompt(line: str, number: int, vocab_size: int) -> list[int]:
    try:
        tokens = json.loads(line)["input_ids"]
        if isinstance(tokens, list) and tokens and all(type(token) is int and 0 <= token < vocab_size for token in tokens):
            return tokens
        why = f"input_ids must be a list of at least one token id, from 0 to {vocab_size - 1}"
    except (ValueError, KeyError, TypeError) as error:
        why = repr(error)
    raise Refusal(f"line {number} of the input is no prompt", why=why, fix='write {"input_ids": [1, 2, 3]}')
