"""The support matrix: refusals are the validator's, ticks are those of tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trireme.core.refusal import Refusal
from trireme.models.planner import Sizes
from trireme_tools.cli import build
from trireme_tools.support_matrix import Result, read_results, support_matrix


def row(table: str, family: str) -> list[str]:
    [line] = [line for line in table.splitlines() if line.startswith(f"| {family} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_without_results_nothing_is_ticked():
    table = support_matrix([])
    assert row(table, "family") == ["PP", "TP", "SP", "CP", "EP gathered", "EP dispatched", "MoE-TP", "MoE-DP", "MTP"]
    assert row(table, "llama") == [*"····–––––"]
    assert row(table, "qwen3_moe") == [*"········–"]
    assert row(table, "qwen3_5") == [*"····––––·"]
    assert row(table, "qwen3_next") == [*"·········"]


def test_a_test_ticks_every_form_of_its_plan():
    results = [
        Result("llama", Sizes(pp=2, tp=2, sp=True), True),
        Result("llama", Sizes(cp=2), False),
        Result("qwen2_moe", Sizes(tp=4, ep=2, experts="dispatched"), True),
        Result("qwen2_moe", Sizes(tp=2, cp=2, ep=2, moe_dp=2), True),
        Result("qwen3_5_moe", Sizes(pp=2, tp=2), True, mtp=3),
    ]
    table = support_matrix(results)
    assert row(table, "llama") == [*"✓✓✓✗–––––"]
    assert row(table, "qwen2_moe") == [*"·✓·✓✓✓✓✓–"]
    assert row(table, "qwen2") == [*"····–––––"]
    assert row(table, "qwen3_5_moe") == [*"✓✓····✓·✓"]


def test_results_are_read_from_the_file_that_tests_write(tmp_path: Path):
    path = tmp_path / "plans.json"
    plan = {"pp": 1, "tp": 2, "cp": 1, "ep": 2, "moe_dp": 1, "sp": False, "experts": "dispatched"}
    notes = [{"family": "qwen3_moe", "plan": plan, "passed": True}, {"family": "qwen3_next", "plan": {"mtp": 2}, "passed": True}]
    path.write_text(json.dumps(notes))
    assert read_results(path) == [
        Result("qwen3_moe", Sizes(tp=2, ep=2, experts="dispatched"), True),
        Result("qwen3_next", Sizes(), True, mtp=2),
    ]
    printed = CliRunner().invoke(build(), ["plan", "--matrix", "--results", str(path)], catch_exceptions=False).output
    assert row(printed, "qwen3_moe") == [*"·✓···✓··–"]


@pytest.mark.parametrize("text", [None, "{", '[{"family": "llama"}]', '[{"family": "llama", "plan": {"dp": 2}, "passed": true}]'])
def test_a_file_of_something_else_is_refused(text: str | None, tmp_path: Path):
    path = tmp_path / "plans.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Refusal, match="has no results of plans"):
        read_results(path)
