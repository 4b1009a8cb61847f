"""`trireme bench --drafts`: the same load with and without drafts, side by side."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tiny import tiny_checkpoint
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
