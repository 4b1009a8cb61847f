"""Arguments that cannot work are refused by the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from trireme.core.refusal import Refusal
from trireme_tools.cli import build


@pytest.mark.parametrize("words", [("--requests", "0"), ("--concurrency", "0"), ("--rate", "0")])
def test_bench_of_nothing(words):
    result = CliRunner().invoke(build(), ["bench", *words])
    assert result.exit_code == 2 and "Invalid value" in result.output


def test_repository_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match="cannot be written"):
        CliRunner().invoke(build(), ["repo", str(tmp_path), str(tmp_path / "file" / "below")], catch_exceptions=False)
