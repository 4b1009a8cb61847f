"""`trireme eval`: how many held-out word problems are answered exactly, by a running server or by one for each of some plans."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from trireme.core.refusal import Refusal
from trireme.serve.metrics import METRICS_PERIOD_S
from trireme_tools.client import Client
from trireme_tools.problems import NUM_HELD_OUT, Problem, answer_of, held_out_problems
from trireme_tools.progress import progress_bar
from trireme_tools.scrape import acceptance_length, read_page
from trireme_tools.serve import backend_directory, served_repository
from trireme_tools.server_home import find_server
from trireme_tools.settings_options import settings_of_words, settings_options
from trireme_tools.supervisor import Supervisor


@settings_options
def evaluate(
    *,
    url: Annotated[str, typer.Option(help="gRPC address of the running server.")] = "127.0.0.1:8001",
    metrics_url: Annotated[str, typer.Option(help="Its metrics; '' for none.")] = "http://127.0.0.1:8002/metrics",
    plan: Annotated[
        list[str] | None, typer.Option(help='Start a server for it instead, as "one" or "pp2 tp2 sp mtp3"; give it again for more.')
    ] = None,
    model: Annotated[Path | None, typer.Option(help="With --plan: checkpoint (default: the project's).")] = None,
    num_problems: Annotated[int, typer.Option("--problems", help="How many.", min=1)] = NUM_HELD_OUT,
    concurrency: Annotated[int, typer.Option(help="Problems at once.", min=1)] = 109,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 160,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each plan as it is done; the table to stderr.")] = False,
    chosen: dict[str, Any],
) -> None:
    """Ask generated word problems in arithmetic, greedily, and count the right answers."""
    if chosen and not plan:
        raise Refusal("settings without a plan", why="the running server has its own", fix='add --plan "one", or leave them out')
    problems, console = held_out_problems(num_problems), Console(stderr=True)
    here = contextlib.nullcontext(Place("running server", url, metrics_url))
    places: list[AbstractContextManager[Place]] = [_serving(words, model, chosen, console) for words in plan] if plan else [here]
    scores, first = [], None
    for context in places:
        with context as place, progress_bar(console, place.name, len(problems)) as tick:
            answers, seconds, accepted = _ask(place, problems, concurrency, max_tokens, tick)
        first = first or answers
        scores.append(score := make_score(place.name, problems, answers, first, seconds, accepted))
        if as_json:
            print(json.dumps(score.as_json()), flush=True)
        else:
            console.print(f"{score.plan}: {score.accuracy:.1%} in {score.seconds:.1f} s")
    (console if as_json else Console()).print(_table(scores))
    if errors := [error for score in scores for error in score.errors]:
        raise Refusal(f"{len(errors)} problems got no answer", why=errors[0], kind="internal")


class Place(NamedTuple):
    """A server that answers."""

    name: str
    url: str
    metrics_url: str


@dataclass
class Answer:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one server did."""

    plan: str
    problems: int
    right: int
    same_as_first: int  # answers whose tokens are those of the first server
    output_tokens: int
    seconds: float
    acceptance_length: float | None  # mean tokens for each time that drafts were verified; None where none were
    errors: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        return self.right / self.problems

    @property
    def standard_error(self) -> float:
        return sqrt(self.accuracy * (1.0 - self.accuracy) / self.problems)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"accuracy": self.accuracy, "standard_error": self.standard_error}


def make_score(
    plan: str, problems: Sequence[Problem], answers: Sequence[Answer], first: Sequence[Answer], seconds: float, accepted: float | None
) -> Score:
    """`first` are the answers of the server that this one is compared with."""
    return Score(
        plan=plan,
        problems=len(problems),
        right=sum(answer_of(answer.text) == problem.answer for problem, answer in zip(problems, answers, strict=True)),
        same_as_first=sum(answer.tokens == other.tokens for answer, other in zip(answers, first, strict=True)),
        output_tokens=sum(len(answer.tokens) for answer in answers),
        seconds=seconds,
        acceptance_length=accepted,
        errors=tuple(answer.error for answer in answers if answer.error),
    )


@contextmanager
def _serving(plan: str, model: Path | None, chosen: dict[str, Any], console: Console) -> Iterator[Place]:
    """A server for the plan; what else is chosen holds for it too."""
    words = settings_of_words(plan)
    words["mtp"] = chosen.get("mtp", {}) | words["mtp"]
    log = backend_directory().parent / "eval.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with served_repository(model, None, chosen | words) as (repository, settings), log.open("wb") as file, contextlib.ExitStack() as stack:
        with console.status("starting tritonserver") as status:
            supervisor = Supervisor(
                find_server(),
                repository=repository,
                settings=settings,
                backend_dir=backend_directory(),
                log=file,
                news=lambda reason: status.update(f"starting tritonserver for {plan}: {reason}"),
            )
            ports = stack.enter_context(supervisor).ports
        yield Place(plan, f"{ports.address}:{ports.grpc}", f"http://{ports.address}:{ports.metrics}/metrics")


def _ask(
    place: Place, problems: Sequence[Problem], concurrency: int, max_tokens: int, tick: Callable[[int], None]
) -> tuple[list[Answer], float, float | None]:
    """(answers, seconds, mean acceptance length by the server's own metrics)."""
    before = read_page(place.metrics_url) if place.metrics_url else {}
    began = time.perf_counter()
    answers = asyncio.run(_ask_all(place.url, problems, concurrency, max_tokens, tick))
    seconds = time.perf_counter() - began
    if not place.metrics_url:
        return answers, seconds, None
    time.sleep(METRICS_PERIOD_S * 1.5)  # the page is that far behind
    return answers, seconds, acceptance_length(before, read_page(place.metrics_url))


async def _ask_all(url: str, problems: Sequence[Problem], concurrency: int, max_tokens: int, tick: Callable[[int], None]) -> list[Answer]:
    gate = asyncio.Semaphore(concurrency)
    async with Client(url) as client:

        async def one(problem: Problem) -> Answer:
            answer = Answer()
            asked = {"text_input": problem.prompt, "stream": True, "return_output_ids": True}
            async with gate:
                try:
                    async for response in client.stream(**asked, temperature=0.0, max_tokens=max_tokens):
                        answer.text += "".join(response.get("text_output", []))
                        answer.tokens += response.get("output_ids", [])
                except Refusal as refusal:
                    answer.error = str(refusal)
            tick(1)
            return answer

        return await asyncio.gather(*map(one, problems))


def _table(scores: Sequence[Score]) -> Table:
    table = Table(title=f"{scores[0].problems} held-out problems", caption=f"same: answers with the tokens of {scores[0].plan!r}")
    for name in ("plan", "accuracy", "±", "tokens", "seconds", "tokens/s", "acceptance length", "same"):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for score in scores:
        accepted = "-" if score.acceptance_length is None else f"{score.acceptance_length:.2f}"
        rate = f"{score.output_tokens / score.seconds:.0f}"
        share, error = f"{score.accuracy:.1%}", f"{score.standard_error:.1%}"
        table.add_row(score.plan, share, error, str(score.output_tokens), f"{score.seconds:.1f}", rate, accepted, str(score.same_as_first))
    return table
