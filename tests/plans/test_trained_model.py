"""The small model that `trireme train` made, checked in: a real head drafts, and drafts change no token and bring some."""

from __future__ import annotations

from pathlib import Path

import pytest

from plans.grid import settings_of
from plans.whole import tokens_of
from tiny import greedy_tokens
from trireme.core.request import Request, Sampling
from trireme.core.settings import make_settings
from trireme.serve.text import Text
from trireme_tools import offline
from trireme_tools.problems import answer_of, held_out_problems
from trireme_tools.small_tokenizer import END_ID

pytestmark = pytest.mark.ranks

MODEL = Path(__file__).resolve().parents[2] / "models" / "Abacus-4M"
PROBLEMS = held_out_problems(6)
MAX_TOKENS = 128


@pytest.fixture(scope="module")
def text() -> Text:
    text = Text.read(MODEL)
    assert text is not None
    return text


@pytest.fixture(scope="module")
def expected(text) -> list[list[int]]:
    answers = greedy_tokens(MODEL, [text.encode(problem.prompt) for problem in PROBLEMS], MAX_TOKENS, ignore_eos=False)
    assert all(len(answer) < MAX_TOKENS for answer in answers), "each ends by itself"
    return answers


@pytest.mark.parametrize(("plan", "num_drafts"), [("one", 0), ("one", 1), ("one", 3), ("pp2", 2), ("pp2", 4)])
def test_tokens_are_transformers_and_drafts_stand(pool, text, expected, plan, num_drafts):
    mtp = {"num_tokens": num_drafts, "adaptive": False}
    values = {"model": str(MODEL), "max_model_len": 512, "num_pages": 200, "threads_per_rank": 1, "mtp": mtp}
    greedy = Sampling(max_tokens=MAX_TOKENS, temperature=0.0, stop_token_ids=(END_ID,))
    requests = [Request(id=str(i), prompt=text.encode(problem.prompt), sampling=greedy) for i, problem in enumerate(PROBLEMS)]
    with offline.running(make_settings(values | settings_of(plan)), pool) as engine:
        answers, stats = tokens_of(engine, requests), engine.stats
    assert answers == expected
    assert [answer_of(text.decode(answer)) for answer in answers] == [problem.answer for problem in PROBLEMS]
    if num_drafts:
        assert 1.3 < 1 + stats.accepted_tokens / stats.verifications <= 1 + num_drafts
    else:
        assert stats.verifications == 0
