"""`trireme plan` as a user types it: tables, JSON, refusals. Checkpoints here are configs alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from real_configs import LLAMA_70B, QWEN3_5_35B, QWEN3_30B, QWEN3_235B
from trireme.core.refusal import Refusal
from trireme_tools.cli import build
from trireme_tools.plan_report import fold


def run(config: dict, directory: Path, *words: str) -> str:
    path = directory / "shape.json"
    path.write_text(json.dumps(config))
    result = CliRunner().invoke(build(), ["plan", str(path), *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def plans(config: dict, directory: Path, *words: str) -> dict:
    return json.loads(run(config, directory, "--json", *words))


def refusal(config: dict, directory: Path, *words: str) -> str:
    with pytest.raises(Refusal) as raised:
        run(config, directory, *words)
    return str(raised.value)


def test_a_table_of_plans_refused_ones_and_the_best_in_detail(tmp_path: Path):
    text = run(QWEN3_30B, tmp_path, "--gpus", "4", "--limit", "3")
    assert "4 x H100 of 80 GiB, 64 requests of 7168 + 1024 tokens" in text and "predictions" in text
    assert "Refused" in text and "a copy of the experts serves" in text
    assert "GiB of each rank" in text and "layers.*.attn" in text and "all_reduce tp" in text


def test_what_fits_nowhere_is_said(tmp_path: Path):
    text = run(QWEN3_235B, tmp_path, "--gpus", "4")
    assert "No plan fits" in text and "lacks 38.0 GiB" in text
    assert "No plan fits" not in run(QWEN3_235B, tmp_path, "--gpus", "4", "--gpu", "H200")
    assert "No plan fits" not in run(QWEN3_235B, tmp_path, "--gpus", "4", "--gpu-memory", "160")


def test_everything_as_json(tmp_path: Path):
    report = plans(LLAMA_70B, tmp_path, "--gpus", "6", "--context", "4096", "--requests", "8", "--output", "96")
    assert report["demand"] == {"context": 4096, "requests": 8, "output": 96} and "not measurements" in report["note"]
    first = report["plans"][0]
    assert first["fits"] and sum(rank["weights_bytes"] for rank in first["ranks"]) >= 2 * 70.5e9
    assert sum(first["layer_cut"]) == 80 and len(first["ranks"]) == 6
    assert all(plan["pp"] * plan["tp"] * plan["cp"] == 6 for plan in report["plans"])
    assert {refused["tp"] for refused in report["refused"]} == {3, 6}
    assert all(refused["why"] and refused["fix"] and refused["nearest"] for refused in report["refused"])
    assert set(report["schedule_of_first"]) == {f"stage_{stage}" for stage in range(first["pp"])}


def test_named_sizes_are_kept_and_make_the_number_of_devices(tmp_path: Path):
    report = plans(QWEN3_30B, tmp_path, "--tp", "2", "--cp", "2", "--ep", "4", "--experts", "dispatched", "--sp", "on")
    [plan] = report["plans"]
    assert plan["options"] == "--tp 2 --cp 2 --ep 4 --sp on --experts dispatched"
    assert {plan["pp"] for plan in plans(QWEN3_30B, tmp_path, "--gpus", "8", "--layer-cut", "20,28")["plans"]} == {2}


def test_states_and_drafts_of_a_hybrid_model(tmp_path: Path):
    """62 MB a sequence on one rank, on two stages half of it each; with drafts a slot holds rows beside them."""
    words = "--gpus", "2", "--pp", "2"
    drafting, plain = plans(QWEN3_5_35B, tmp_path, *words)["plans"], plans(QWEN3_5_35B, tmp_path, *words, "--mtp", "0")["plans"]
    assert [plan[0]["state_bytes_per_sequence"] for plan in (drafting, plain)] == [34_340_864, 32_194_560]
    assert [[rank["held_bytes"] > 0 for rank in plan[0]["ranks"]] for plan in (drafting, plain)] == [[True] * 2, [False] * 2]
    assert max(rank["weights_bytes"] for rank in plain[0]["ranks"]) < max(rank["weights_bytes"] for rank in drafting[0]["ranks"])
    text = run(QWEN3_5_35B, tmp_path, *words)
    assert "pp2 mtp3" in text and re.search(r"sequence, MiB", text) and "32.8" in text
    assert "sequence, MiB" not in run(QWEN3_30B, tmp_path, "--gpus", "1")


def test_numbers_on_a_cpu_are_float32(tmp_path: Path):
    on_cpu, on_gpu = (plans(QWEN3_30B, tmp_path, "--gpus", "1", "--gpu", gpu)["plans"][0] for gpu in ("CPU", "H200"))
    assert on_cpu["ranks"][0]["weights_bytes"] == 2 * on_gpu["ranks"][0]["weights_bytes"]


@pytest.mark.parametrize(
    ("config", "words", "sentence"),
    [
        (LLAMA_70B, "--tp 3", "tp=3 does not divide 64 query heads: .*fix: use tp=2; the nearest legal plan is --pp 3"),
        (LLAMA_70B, "--gpus 8 --ep 2", "for a checkpoint without experts: llama is dense .*nearest legal plan is --tp 8"),
        (LLAMA_70B, "--gpus 6 --tp 3", "tp=3 does not divide .*nearest legal plan is --"),
        (LLAMA_70B, "--gpus 8 --pp 2 --tp 2 --cp 1", "no plan of 8 devices has --pp 2 --tp 2: .*nearest legal plan is --pp 2 --tp 4"),
        (LLAMA_70B, "--gpus 1 --sp on", "no plan of 1 devices has --sp on: .*nearest legal plan is one rank"),
        (QWEN3_30B, "--gpus 4 --layer-cut 10,20", "layer_cut=.10, 20. does not cut 48 layers .*nearest legal plan is --pp 2 --tp 2"),
        (QWEN3_30B, "--tp 2 --cp 2 --moe-dp 4", "moe_dp=4 with cp=2: .*nearest legal plan is --tp 2 --cp 2 --moe-dp 2"),
        (QWEN3_30B, "--gpu H1000", "no data sheet of 'H1000': known are H100"),
        (QWEN3_30B, "--context 50000", "--context 50000: the checkpoint has positions for 40960 tokens"),
        (QWEN3_30B, "--context 100 --output 100", "--output 100 of --context 100"),
        (QWEN3_30B, "--experts scattered", "bad setting"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest_that_can(config: dict, words: str, sentence: str, tmp_path: Path):
    assert re.search(sentence, refusal(config, tmp_path, *words.split()))


def test_no_model_no_plan():
    with pytest.raises(Refusal, match="no model is named"):
        CliRunner().invoke(build(), ["plan"], catch_exceptions=False)


def test_layers_alike_are_one_line():
    schedule = ["plain", "  enter  all_reduce tp", *(f"  layers.{layer}.mlp  all_reduce tp, slice tp" for layer in range(12)), "cp"]
    assert fold(schedule) == [("plain", "enter", "all_reduce tp", 1), ("plain", "layers.*.mlp", "all_reduce tp, slice tp", 12)]
