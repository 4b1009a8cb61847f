"""Regimes of steps: the largest of each is what a rank makes room for, alone; and the number of rows from which one is taken."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chained import build_decoder
from tiny import tiny_checkpoint
from trireme.core.settings import make_settings, revise
from trireme.core.step import Regime
from trireme.parallel.aside import Done
from trireme.parallel.deal import Deal
from trireme.parallel.plan import Plan
from trireme.parallel.rehearsal import rehearse
from trireme.ranks import runner
from trireme.ranks.load import load_runner
from trireme.ranks.regimes import first_for_good, largest_steps, measures_sp, sizes_for_sp
from trireme_tools.settings_options import settings_of_words


@pytest.mark.parametrize(
    ("pays", "size"),
    [
        ([True, True, True], 1),
        ([False, True, True], 2),
        ([True, False, True], 3),
        ([False, False, True], 3),
        ([False, False, False], 3),
        ([True, True, False], 1),
    ],
)
def test_a_regime_is_taken_where_it_pays_for_good_and_at_the_last_size_anyway(pays, size):
    assert first_for_good((1, 2, 3), pays) == size


@pytest.mark.parametrize(
    ("max_num_seqs", "num_drafts", "sizes"),
    [(8, 0, (64, 128, 256, 512, 1024, 2048)), (64, 3, (256, 512, 1024, 2048)), (256, 0, (512, 1024, 2048)), (3000, 0, (3001,))],
)
def test_sequence_parallelism_that_is_measured_begins_beyond_decode_steps(max_num_seqs, num_drafts, sizes):
    settings = make_settings({"model": "m", "tensor_parallel_size": 2, "sequence_parallel": "on", "max_num_seqs": max_num_seqs})
    assert sizes_for_sp(settings, num_drafts) == sizes
    assert measures_sp(settings, torch.device("cuda")) and not measures_sp(settings, torch.device("cpu"))
    assert not measures_sp(revise(settings, {"sequence_parallel": 64}), torch.device("cuda"))


@given(
    tp=st.sampled_from([1, 2]),
    cp=st.sampled_from([1, 2, 4]),
    sp=st.sampled_from(["off", "on", 3, 40]),
    num_drafts=st.sampled_from([0, 3]),
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    decodes=st.booleans(),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_no_step_is_larger_than_the_largest_of_its_regime(tp, cp, sp, num_drafts, counts, decodes, device):
    sizes = {"tensor_parallel_size": tp, "context_parallel_size": cp, "sequence_parallel": sp, "max_num_seqs": 8}
    settings = make_settings({"model": "m", **sizes, "max_num_batched_tokens": 100})
    counts = [min(count, 1 + num_drafts) for count in counts] if decodes else counts
    if sum(counts) > 100:
        return
    device = torch.device(device)
    latest = sizes_for_sp(settings, num_drafts)[-1] if measures_sp(settings, device) else settings.sp_from
    regime = Regime.of(counts, latest, 1 if decodes else cp)
    every = [Regime(*each) for each in product({False, settings.sp_from is not None}, {False, cp > 1})]
    largest = {regime: step for step, regime in largest_steps(settings, every, 100, num_drafts, device)}
    assert sum(counts) <= largest[regime].sum() and len(largest[regime]) <= 8
    assert all((step.sum() <= 100) and step.min() >= (2 * cp if regime.cp else 1) for regime, step in largest.items())


@pytest.mark.parametrize(("num_rows", "num_strips"), [(16, 1), (17, 2)])
def test_seams_that_are_timed_are_waited_for_strip_by_strip(tmp_path, monkeypatch, num_rows, num_strips):
    plan, waits = Plan(layer_cut=(2,), tp=2, sp=True, strip_rows=16), []
    model = tiny_checkpoint(tmp_path, "qwen3", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    decoder = build_decoder(model, plan, 0)
    rehearse(decoder.build.collectives)
    monkeypatch.setattr(Done, "wait", lambda done: waits.append(done))
    with torch.inference_mode():
        decoder.inner_seams(Deal(plan, 0, np.array([num_rows], np.int32), Regime(sp=True)))()
    assert len(waits) == 2 * num_strips  # of a layer's two seams


@pytest.mark.parametrize(
    ("family", "plan"),
    [("qwen3", "tp2 sp"), ("qwen3", "tp2 cp2 sp"), ("qwen3_5_moe", "tp2 cp2 ep2 sp mtp2"), ("qwen3_moe", "pp2 tp2 cp2 ep2 dispatched sp")],
)
def test_a_rank_passes_the_largest_step_of_every_regime_alone(tmp_path, monkeypatch, family, plan):
    """As on a GPU before the ranks meet, to see what memory is left."""
    model = tiny_checkpoint(tmp_path, family, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    values = {
        "max_num_seqs": 6,
        "max_num_batched_tokens": 48,
        "max_model_len": 64,
        "kv_cache_memory_bytes": 4_000_000,
        "threads_per_rank": 1,
    }
    later = {"sequence_parallel": 40}  # than from 2 rows on, so that there are steps of every regime
    settings = make_settings({"model": str(model), **values, **settings_of_words(plan), **later})
    find_room, deal, passed = runner.find_room, runner.Deal, []

    def measured(*args, largest, decode, **rest):
        largest()
        decode()
        return find_room(*args, largest=largest, decode=decode, **rest)

    def dealt(plan, rank, counts, regime, device, **rest):
        passed.append(regime)
        return deal(plan, rank, counts, regime, device, **rest)

    monkeypatch.setattr(runner, "find_room", measured)
    monkeypatch.setattr(runner, "Deal", dealt)
    for stage in range(settings.num_stages):
        load_runner(settings, stage, 1, lambda sentence: None)
        cp = (False, True) if settings.context_parallel_size > 1 else (False,)
        assert set(passed) == {Regime(sp, each) for sp in (False, True) for each in cp}
        passed.clear()
