"""`trireme bench` without a server: the same load with and without drafts, and several plans in one picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny import tiny_checkpoint
from trireme.core.refusal import Refusal
from trireme_tools.cli import build

pytestmark = pytest.mark.ranks


def test_with_and_without_drafts(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "qwen3_5_moe")
    words = ["bench", f"--model={model}", "--drafts=0,2", "--requests=3", "--concurrency=2", "--input-len=8", "--output-len=6"]
    words += ["--threads-per-rank=1", "--kv-cache-memory-bytes=4000000", f"--output={tmp_path / 'bench'}"]
    result = CliRunner().invoke(build(), words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    without, two = json.loads((tmp_path / "bench.json").read_text())["drafts"]
    assert (without["drafts"], two["drafts"]) == (0, 2)
    assert without["output_tokens"] == two["output_tokens"] == 3 * 6
    assert without["acceptance_length"] is None and 1.0 <= two["acceptance_length"] <= 3.0


def test_prefill_of_several_plans_in_one_picture(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "qwen3")
    bench, reports = build(), {"one rank": [], "cp2": ["--cp=2"]}
    for plan, flags in reports.items():
        words = ["bench", "--offline", f"--model={model}", "--prefill=8,40,3x8", "--threads-per-rank=1", "--kv-cache-memory-bytes=4000000"]
        result = CliRunner().invoke(bench, [*words, *flags, f"--output={tmp_path / plan}"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / f"{plan}.json").read_text())
        assert (report["plan"], report["activation_bytes"]) == (plan, [0])  # which a CPU does not measure
        assert [(each["prompts"], each["input_len"], len(each["runs"])) for each in report["prefill"]] == [(1, 8, 5), (1, 40, 5), (3, 8, 5)]
    names = ",".join(str(tmp_path / f"{plan}.json") for plan in reports)
    result = CliRunner().invoke(bench, ["bench", f"--plot={names}", f"--output={tmp_path / 'both'}"], catch_exceptions=False)
    assert result.exit_code == 0 and (tmp_path / "both.png").stat().st_size, result.output


def test_decode_of_several_plans_in_one_picture_and_reports_of_two_kinds_in_none(tmp_path):
    names = []
    for plan, step_ms in {"one rank": 6.0, "tp2": 4.0}.items():
        names.append(str(tmp_path / f"{plan}.json"))
        Path(names[-1]).write_text(
            json.dumps({"plan": plan, "decode": [{"batch": 1, "step_ms": step_ms}, {"batch": 8, "step_ms": 2 * step_ms}]})
        )
    result = CliRunner().invoke(build(), ["bench", f"--plot={','.join(names)}", f"--output={tmp_path / 'both'}"], catch_exceptions=False)
    assert result.exit_code == 0 and (tmp_path / "both.png").stat().st_size, result.output
    names.append(str(tmp_path / "prefill.json"))
    Path(names[-1]).write_text(json.dumps({"plan": "cp2", "prefill": []}))
    with pytest.raises(Refusal, match="not of one kind"):
        CliRunner().invoke(build(), ["bench", f"--plot={','.join(names)}"], catch_exceptions=False)
