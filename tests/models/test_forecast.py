"""Forecasts: bytes of published checkpoints, and times that follow from a data sheet by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from real_configs import LLAMA_70B, QWEN3_5_35B, QWEN3_30B, QWEN3_235B
from trireme.core.settings import make_settings
from trireme.models.forecast import Demand, Forecast, forecast
from trireme.models.hardware import DEVICES, GIB, Reach
from trireme.models.spec import make_spec
from trireme.parallel.plan import Plan

H100 = DEVICES["H100"]
DEMAND = Demand(context=8192, requests=64, output=1024)
LOGITS = 12 * 248320  # of a row of Qwen3.5-35B-A3B: written in float32, read twice


def predict(config: dict, demand: Demand = DEMAND, device=H100, **settings: Any) -> Forecast:
    spec, chosen = make_spec(config), make_settings({"model": "/m", **settings})
    return forecast(spec, Plan.of(chosen, spec), chosen, device, demand, item_bytes=2)


@pytest.mark.parametrize(
    ("config", "billions"),
    [(LLAMA_70B, 70.55), (QWEN3_30B, 30.53), (QWEN3_235B, 235.09), (QWEN3_5_35B, 34.66)],  # as their cards say: 70.6, 30.5, 235, 35
)
def test_published_sizes(config: dict, billions: float):
    [rank] = predict(config, mtp={"num_tokens": 0}).ranks
    assert round(rank.weights / 2e9, 2) == billions


def test_what_is_too_large_for_four_devices_fits_on_eight():
    """Qwen3-235B: 470 GB of weights in bfloat16."""
    four = predict(QWEN3_235B, tensor_parallel_size=4, expert_parallel_size=4)
    assert not four.fits and four.missing_bytes > 37 * GIB and four.decode_s == four.tokens_per_s == 0
    eight = predict(QWEN3_235B, tensor_parallel_size=8, expert_parallel_size=8)
    assert eight.fits and eight.decode_s > 0 and eight.missing_bytes == 0


def test_keys_and_values_take_what_weights_leave():
    """Of eight key/value heads tp=8 has one a rank: 2 * 80 layers * 128 numbers of two bytes for each token."""
    held = predict(LLAMA_70B, tensor_parallel_size=8)
    rank = held.fullest
    assert rank.kv_per_token == 2 * 80 * 128 * 2
    left = H100.usable_bytes - rank.fixed
    assert held.capacity_tokens == left // rank.kv_per_token // 16 * 16
    assert held.capacity_requests == held.capacity_tokens // 8192


def test_where_rows_are_cut_memory_for_mail_is_no_keys_and_values():
    """Two ranks, steps of 8192 rows of 8192 numbers: on each 8192 gathered rows and the other's 4096 of a sum."""
    sizes = {"tensor_parallel_size": 2, "max_num_batched_tokens": 8192, "device": replace(H100, memory_bytes=141 * GIB)}
    whole, cut = predict(LLAMA_70B, **sizes), predict(LLAMA_70B, **sizes, sequence_parallel="on")
    assert [rank.mailbox for rank in (whole.fullest, cut.fullest)] == [0, 12288 * 8192 * 2]
    rank = cut.fullest
    assert cut.capacity_tokens == (cut.usable_bytes - rank.weights - rank.activations - rank.mailbox) // rank.kv_per_token // 16 * 16
    assert predict(LLAMA_70B, **sizes | {"device": DEVICES["CPU"]}, sequence_parallel="on").fullest.mailbox == 0


def test_gpus_decode_without_sequence_parallelism_unless_told_the_rows():
    whole, on, told = ({"tensor_parallel_size": 2, "sequence_parallel": sp} for sp in ("off", "on", 16))
    roomy = replace(H100, memory_bytes=141 * GIB)
    times = [predict(QWEN3_30B, device=roomy, **sizes).decode_s for sizes in (whole, on, told)]
    assert times[0] == times[1] < times[2]
    cpus = [predict(QWEN3_30B, device=replace(roomy, is_gpu=False), **sizes).decode_s for sizes in (whole, on)]
    assert cpus[0] < cpus[1]


def test_a_sequence_of_a_hybrid_model_takes_states_and_few_pages():
    """Of 40 layers 10 keep two heads' keys and values of 256 numbers. 30 keep the last three of 8192 inputs, and 32 matrices of
    128 x 128 in float32; twice, since a snapshot may stay for whoever begins alike."""
    held = predict(QWEN3_5_35B, mtp={"num_tokens": 0}, pipeline_parallel_size=1)
    rank, sheet = held.fullest, replace(H100, memory_bytes=141 * GIB)
    assert (rank.kv_per_token, rank.state, rank.held) == (10 * 2 * 2 * 256 * 2, 30 * (3 * 8192 * 2 + 32 * 128 * 128 * 4), 0)
    assert rank.per_request == 2 * rank.state
    roomy = predict(QWEN3_5_35B, device=sheet, mtp={"num_tokens": 0})
    left = sheet.usable_bytes - rank.fixed
    assert roomy.capacity_requests == left // (8192 * rank.kv_per_token + rank.per_request)
    assert roomy.capacity_tokens == (left - 64 * rank.per_request) // rank.kv_per_token // 16 * 16


def test_a_stage_without_attention_has_room_for_any_token():
    """Three layers of the delta rule, and the rest: what limits the plan is the second."""
    held = predict(QWEN3_5_35B, pipeline_parallel_size=2, layer_cut=[3, 37], device=replace(H100, memory_bytes=141 * GIB))
    assert [rank.kv_per_token > 0 for rank in held.ranks] == [False, True]
    assert held.fits and held.fullest.stage == 1 and held.capacity_tokens > 0
    drafting, plain = held.ranks[1], predict(QWEN3_5_35B, pipeline_parallel_size=2, layer_cut=[3, 37], mtp={"num_tokens": 0}).ranks[1]
    assert drafting.kv_per_token - plain.kv_per_token == 2 * 2 * 256 * 2  # of the head that drafts
    assert drafting.held == 27 * 4 * (8192 + 2 * 32) * 2 and plain.held == 0


def test_a_decode_step_reads_and_writes_states():
    """What one more sequence costs at the data sheet's very speed, apart from the experts that it reads: keys, values, states, logits."""
    sheet = replace(H100, memory_bytes=200 * GIB, reach=Reach(memory=1, flops=1, bandwidth=1, link=1, collective_s=0, hop_s=0))
    config = {**QWEN3_5_35B, "text_config": {**QWEN3_5_35B["text_config"], "num_experts_per_tok": 256}}
    one, two = (predict(config, Demand(1000, requests, 10), sheet, mtp={"num_tokens": 0}) for requests in (1, 2))
    rank = one.ranks[0]
    assert two.decode_s - one.decode_s == pytest.approx((1000 * rank.kv_per_token + 2 * rank.state + LOGITS) / 3.35e12, rel=1e-6)


def test_redundant_experts_are_read_in_decodes():
    """Qwen3-30B-A3B on two ranks: with 32 copies each reads 16 experts more in each of 48 layers, where rows touch them all; a step of
    an H100 took 2.4 ms longer so (tools/measurements/2026-11-22-h100s.md)."""
    sizes = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
    demand = Demand(context=1024, requests=256, output=512)
    plain = predict(QWEN3_30B, demand, **sizes, eplb={})
    copies = predict(QWEN3_30B, demand, **sizes, eplb={"num_redundant_experts": 32})
    num_bytes = 48 * 16 * 3 * 2048 * 768 * 2
    assert copies.redundant_s == pytest.approx(num_bytes / (H100.bandwidth * H100.reach.bandwidth), rel=1e-3)
    assert copies.decode_s == pytest.approx(plain.decode_s + copies.redundant_s) and plain.redundant_s == 0


def test_the_stage_with_least_room_counts():
    held = predict(LLAMA_70B, pipeline_parallel_size=4, layer_cut=[17, 17, 17, 29])
    assert held.fullest.stage == 3
    assert held.capacity_tokens == held.fullest.tokens(H100.usable_bytes, held.concurrent)


def test_a_decode_step_reads_weights_and_keys():
    """One rank at the data sheet's very speed: every byte of weights but the embedding's, and of 2 requests' keys and values."""
    sheet = replace(H100, memory_bytes=200 * GIB, reach=Reach(memory=1, flops=1, bandwidth=1, link=1, collective_s=0, hop_s=0))
    held = predict(LLAMA_70B, Demand(context=1000, requests=2, output=10), sheet)
    [rank] = held.ranks
    read = rank.weights - 2 * 128256 * 8192 + 2 * 1000 * rank.kv_per_token
    assert held.decode_s == pytest.approx(read / 3.35e12, rel=1e-4)


def test_a_long_chunk_is_bound_by_products():
    """One chunk of 8000 rows: two FLOPs a number and row, and four a key, head and number of a head; a row sees 4000 keys. The head
    is read for one row."""
    sheet = replace(H100, memory_bytes=200 * GIB, reach=Reach(memory=1, flops=1, bandwidth=1, link=1, collective_s=0, hop_s=0))
    held = predict(LLAMA_70B, Demand(context=8001, requests=1, output=1), sheet, max_num_batched_tokens=8192)
    numbers = held.ranks[0].weights / 2 - 2 * 128256 * 8192
    flops = 8000 * (2 * numbers + 4 * 4000 * 80 * 64 * 128)
    assert held.prefill_s == pytest.approx(flops / 989e12 + 128256 * 8192 * 2 / 3.35e12, rel=1e-4)


def test_stages_overlap_chunks_and_add_their_hops():
    """Many chunks: two stages take half the time of one, and one chunk more."""
    one, two = (predict(LLAMA_70B, device=replace(H100, memory_bytes=200 * GIB), pipeline_parallel_size=pp) for pp in (1, 2))
    assert 0.5 < two.prefill_s / one.prefill_s < 0.6
    assert two.decode_s > one.decode_s * 0.9  # a token still passes every layer
    assert two.tokens_per_s > 1.5 * one.tokens_per_s
