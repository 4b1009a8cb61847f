"""Any plan, same tokens: tensor, sequence, context and expert parallel stages, with pipelines of them, give transformers' greedy
tokens and prompt logprobs, also where a prompt begins with pages and states of another. A few in every run, the whole grid by
`make test-plans`; both note what passed for README's matrix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from plans.grid import FEW, FOR_THIRDS, GRID, settings_of, sizes_of
from plans.test_plans import make_prompts
from plans.whole import assert_same_tokens, emissions_of, tokens_of
from tiny import greedy_tokens, prompt_logits, tiny_checkpoint
from trireme.core.request import Request, Sampling
from trireme.core.settings import Settings, make_settings
from trireme.models.planner import SETTINGS
from trireme.ranks.pool import RankPool
from trireme_tools import offline

pytestmark = pytest.mark.ranks

NUM_TOKENS, MORE_TOKENS = 12, 24  # the latter where pages are to run out
PROMPTS = make_prompts()
ALIKE = range(8, 12)  # of them, which begin alike
RESULTS = Path(__file__).resolve().parents[2] / "build" / "plans.json"


class Oracle:
    """Checkpoints and transformers' answers to them, made where a test first asks."""

    def __init__(self, root: Path):
        self._root = root
        self._known: dict[str, tuple[Path, list[list[int]], list[torch.Tensor]]] = {}

    def of(self, family: str, plan: str) -> tuple[Path, list[list[int]], list[torch.Tensor]]:
        """(checkpoint, greedy tokens of PROMPTS, log-probabilities at each position of each [L, V])."""
        name = f"{family} for three" if plan in FOR_THIRDS else family
        if name not in self._known:
            folder = tiny_checkpoint(self._root / name, family, **sizes_of(family, plan))
            logprobs = [prompt_logits(folder, prompt).log_softmax(-1) for prompt in PROMPTS]
            self._known[name] = folder, greedy_tokens(folder, PROMPTS, MORE_TOKENS), logprobs
        return self._known[name]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="module")
def passed() -> Iterator[list[dict]]:
    """What passed, told to `trireme plan --matrix --results`."""
    notes: list[dict] = []
    yield notes
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(notes, indent=1) + "\n")


@pytest.mark.parametrize(
    ("family", "plan"),
    [pytest.param(family, plan, marks=[] if (family, plan) in FEW else pytest.mark.grid) for family, plan in GRID],
)
def test_a_parallel_plan_changes_nothing(expected: Oracle, pool: RankPool, passed: list[dict], family: str, plan: str):
    folder, tokens, logprobs = expected.of(family, plan)
    base = {"max_model_len": 256, "max_num_seqs": 8, "num_pages": 200, "threads_per_rank": 1, "max_num_batched_tokens": 100}
    base |= {"strip_rows": 1}  # with sp, steps of more than half of 100 rows pass in strips
    settings = make_settings({"model": str(folder), **base, "mtp": {"num_tokens": 0}, **settings_of(plan)})
    # every third prompt tells its logprobs; those bypass the reuse of pages, the others do not
    asked = {i for i, prompt in enumerate(PROMPTS) if i % 3 == 0 and len(prompt) > 1}
    num_tokens = MORE_TOKENS if "few" in plan else NUM_TOKENS
    requests = [
        Request(
            id=str(i), prompt=prompt, sampling=Sampling(max_tokens=num_tokens, temperature=0.0, prompt_logprobs=1 if i in asked else None)
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    with offline.running(settings, pool) as engine:
        answers = emissions_of(engine, requests)
        assert all(answer[-1].error is None for answer in answers), [answer[-1].error for answer in answers]
        if "few" in plan:
            assert engine.stats.preemptions > 0, "the pool is meant to be too small"
        assert (engine.stats.cp_steps > 0) == ("cp" in plan) and (engine.stats.sp_steps > 0) == ("sp" in plan.split())
        cached = engine.stats.cached_tokens
        again = [Request(id=f"{i} again", prompt=PROMPTS[i], sampling=Sampling(max_tokens=num_tokens, temperature=0.0)) for i in ALIKE]
        found_again = tokens_of(engine, again)
        assert engine.stats.cached_tokens > cached or "few" in plan
        assert (engine.stats.drafted_tokens > 0) == ("mtp" in plan)
    found = [[token for emission in answer for token in emission.tokens] for answer in answers]
    assert_same_tokens(folder, PROMPTS, found, [wanted[:num_tokens] for wanted in tokens])
    assert_same_tokens(folder, [PROMPTS[i] for i in ALIKE], found_again, [tokens[i][:num_tokens] for i in ALIKE])
    for i in asked:
        (told,) = [emission.prompt_logprobs for emission in answers[i] if emission.prompt_logprobs is not None]
        wanted = [logprobs[i][at, token].item() for at, token in enumerate(PROMPTS[i][1:])]
        assert [entry.value for entry in told[1:]] == pytest.approx(wanted, abs=1e-4)
        assert [entry.token for entry in told[1:]] == PROMPTS[i][1:]
    passed.append({"family": family, "plan": plan_of(settings), "passed": True})


def plan_of(settings: Settings) -> dict[str, Any]:
    """As `trireme plan --results` reads it."""
    return {name: getattr(settings, setting) for name, setting in SETTINGS.items()} | {
        "sp": settings.sp_from is not None,
        "mtp": settings.mtp.num_tokens,
    }
