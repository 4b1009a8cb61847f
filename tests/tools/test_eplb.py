"""`trireme eplb`: recorded loads placed anew, and a live service's answer as a table and a picture."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from typer.testing import CliRunner

from trireme.core.control import Push
from trireme.core.refusal import Refusal
from trireme.core.settings import Eplb
from trireme.engine.balancer import Balancer, StageExperts
from trireme.engine.eplb_file import Origin
from trireme.engine.placing import Slots
from trireme_tools.cli import build
from trireme_tools.plots import plot_steps
from trireme_tools.rebalance import steps_around_moves
from trireme_tools.timeline import Bar, steps_of

SLOTS = Slots(num_experts=64, num_slots=80, num_ranks=4)
LOADS = (1e6 / np.arange(1, 65)).astype(np.int32)


@pytest.fixture
def served() -> Balancer:
    """A service with two layers of a stage that pushed a few times, and took nothing."""
    balancer = Balancer(
        Eplb(num_redundant_experts=16), [StageExperts(("3", "mtp"), SLOTS, 1 << 20, row_s=1e-8)], Origin.of(b"{}", "ep4"), now=0.0
    )
    balancer.recorder.start("per_pass")
    for number in range(5):
        balancer.push(Push(0, number, 0, np.stack([LOADS, LOADS[::-1]]).tobytes(), moved_bytes=1 << 20), float(number))
    return balancer


def run(*words: str, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(build(), ["eplb", *words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("policy", ["auto", "global", "skew", "minimal"])
def test_simulate(served, tmp_path, policy):
    """Zipf 1.0, the busiest experts side by side: from below 0.6 to above 0.9."""
    served.dump(tmp_path / "loads")
    words = ["--slots=80", "--ranks=4", f"--policy={policy}", f"--expert-bytes={1 << 20}", f"--output={tmp_path / 'heat.png'}"]
    every = run("simulate", str(tmp_path / "loads"), *words)
    cells = [row.split("│")[1:-1] for row in every.splitlines() if row.startswith("│")]
    assert [row[0].strip() for row in cells] == ["0", "1", "all"]
    for _, before, after, gain, moved, mib in cells:
        assert float(before) < 0.6 and float(after) > 0.9 and float(gain.strip().rstrip("%")) > 40
        assert float(mib) == int(moved) > 0
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_simulate_from_the_maps_of_a_saved_state(served, tmp_path):
    """What a server has is what there is before; loads that are balanced already move nothing."""
    served.save(tmp_path)
    words = ["--slots=80", "--ranks=4", f"--output={tmp_path / 'heat.png'}"]
    assert "0.622" in run("simulate", str(tmp_path / "eplb.safetensors"), *words)


def test_simulate_knows_an_expert_by_its_checkpoint(served, tmp_path):
    served.dump(tmp_path / "loads")
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    sizes |= {"intermediate_size": 8, "vocab_size": 16, "max_position_embeddings": 64, "torch_dtype": "bfloat16", "hidden_act": "silu"}
    sizes |= {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "norm_topk_prob": True, "rms_norm_eps": 1e-6}
    sizes |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False, "rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **sizes}))
    words = ["--slots=80", "--ranks=4", f"--model={tmp_path}", f"--output={tmp_path / 'heat.png'}"]
    last = [row.split("│") for row in run("simulate", str(tmp_path / "loads"), *words).splitlines() if row.startswith("│")][-1]
    assert float(last[6]) == 3 * int(last[5]), "3 x 256 x 2048 numbers of 2 bytes"


def test_simulate_refuses(served, tmp_path):
    served.dump(tmp_path / "loads")
    for words, sentence in ((("--slots=81",), "81 slots on 4 ranks"), (("--slots=60",), "60 slots for 64 experts")):
        with pytest.raises(Refusal, match=sentence):
            run("simulate", str(tmp_path / "loads"), *words, "--ranks=4")
    with pytest.raises(Refusal, match="is missing"):
        run("simulate", str(tmp_path / "none"), "--slots=80", "--ranks=4")
    Balancer(Eplb(), [StageExperts(("0",), SLOTS, 1)], Origin("", ""), now=0.0).save(tmp_path)
    with pytest.raises(Refusal, match="has no loads"):
        run("simulate", str(tmp_path / "eplb.safetensors"), "--slots=80", "--ranks=4")


def test_show(served, tmp_path):
    """A table of layers and a picture, from the answer of an HTTP generate request."""
    with _server({"/v2/models/eplb/generate": (200, {"text_output": json.dumps(served.query(now=65.0))})}) as url:
        out = run("show", url, f"--output={tmp_path / 'live.png'}")
        assert json.loads(run("show", url, "--json"))["stages"][0]["num_slots"] == 80
    assert "stage 0; maps of version 0; changed 65 s ago; 5.0 MiB moved" in out
    assert "mtp" in out and "0.622" in out
    assert (tmp_path / "live.png").read_bytes().startswith(b"\x89PNG")


def test_show_says_what_is_missing():
    with _server({}) as url, pytest.raises(Refusal, match="serve with --eplb"):
        run("show", url)
    with pytest.raises(Refusal, match="is a server up"):
        run("show", "http://127.0.0.1:9")


class _server:
    """Answers POST requests by path with (status, JSON); 400 for others."""

    def __init__(self, answers: dict[str, tuple[int, object]]):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert "query" in json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = answers.get(self.path, (400, {"error": "unknown model"}))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *_: object) -> None: ...

        self._server = HTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_steps_around_moves(tmp_path):
    """100 decodes of 8 rows after a prefill. Experts that are offered at step 40 are in force with step 50, which takes twice as long,
    and steps after it are faster; of a drill before, all is dropped. Step 20 is launched late, and that of step 80 is told late."""
    bars, ended = [Bar(0, 0, 0, 64, 0.0, 0.0, 0.5)], 0.5
    for number in range(1, 101):
        took = 0.010 if number < 50 else 0.020 if number == 50 else 0.008
        late, told = 0.004 if number == 20 else 0.0, 0.002 if number == 80 else 0.0
        bars.append(Bar(0, number, 0, 8, ended + late + told, 0.0, took, 0.004 if number == 50 else 0.0, late))
        ended += took + late
    history = [
        {"reason": "fault", "offered": 4, "step": 8, "fault": "came spoilt"},
        {"reason": "balance", "offered": 40, "step": 55, "received": 3, "moved_bytes": 12},
    ]
    steps = steps_of(bars, 8, history)
    assert steps.moving == [(4, 12), (40, 54)]
    assert steps.number[steps.near].tolist() == [*range(4, 13), *range(40, 55)]
    seen = steps_around_moves(steps, history)
    figures = (
        "steps",
        "commits",
        "moves",
        "received_experts",
        "moved_bytes",
        "step_ms_before",
        "step_ms_while",
        "step_ms_after",
        "stalled_ms",
    )
    assert [round(seen[name], 6) for name in figures] == [99, 1, 1, 3, 12, 10, 10, 8, 4]
    assert round(seen["longest_over_neighbours_near_moves"], 2) == 2.22  # 20 over the median of eight 10s and eight 8s
    assert round(seen["longest_over_neighbours_elsewhere"], 2) == 1.4 and seen["faults"] == ["came spoilt"]
    assert (seen["steps_over_1.5_near_moves"], seen["steps_over_1.5_elsewhere"]) == (1, 0)
    long, late, told = seen["longest"]["near_moves"][0], *seen["longest"]["elsewhere"][:2]
    assert (long["step"], long["after_offer"], long["commits"], long["longer_in"]) == (50, 10, True, "device")
    assert (late["step"], late["after_offer"], late["commits"], late["longer_in"]) == (20, None, False, "waiting")
    assert (told["step"], told["longer_in"]) == (80, "telling")
    plot_steps({"moving, stage 0": steps, "still, stage 0": steps._replace(moving=[])}, 1.5, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(Refusal, match="too few decode steps"):
        steps_around_moves(steps_of(bars[:20], 8, history), history)
