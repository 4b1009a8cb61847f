"""The planner: what it lists, in which order, and what it says of the rest."""

from __future__ import annotations

from math import log2

import pytest

from parallel.test_plan import SPEC
from real_configs import LLAMA_70B, QWEN3_30B, QWEN3_235B
from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.models.forecast import Demand
from trireme.models.hardware import DEVICES
from trireme.models.planner import Sizes, Survey, candidates, survey
from trireme.models.spec import Spec, make_spec
from trireme.parallel.plan import Plan

SETTINGS = Settings(model="/m")
DEMAND = Demand(context=8192, requests=64, output=1024)


def look(spec: Spec, num_gpus: int, settings: Settings = SETTINGS, **fixed) -> Survey:
    return survey(spec, settings, num_gpus, DEVICES["H100"], DEMAND, 2, fixed)


@pytest.mark.parametrize("config", [LLAMA_70B, QWEN3_30B, QWEN3_235B])
@pytest.mark.parametrize("num_gpus", [1, 4, 6, 8])
def test_every_plan_uses_every_device_and_is_what_load_would_make(config: dict, num_gpus: int):
    spec = make_spec(config)
    found = look(spec, num_gpus)
    assert found.options
    for option in found.options:
        assert option.plan == Plan.of(option.sizes.settings(SETTINGS), spec) and option.plan.world == num_gpus
    for refused in found.refused:
        with pytest.raises(Refusal) as raised:
            Plan.of(refused.sizes.settings(SETTINGS), spec)
        assert str(raised.value) == str(refused.refusal)


def test_what_fits_comes_first_and_the_fastest_of_it():
    options = look(make_spec(QWEN3_235B), 8).options
    fits = [option.forecast.fits for option in options]
    assert fits == sorted(fits, reverse=True) and 0 < sum(fits) < len(fits)
    speeds = [float(f"{option.forecast.tokens_per_s:.3g}") for option in options if option.forecast.fits]
    assert speeds == sorted(speeds, reverse=True)


def test_nothing_of_235b_fits_on_four_devices():
    assert not any(option.forecast.fits for option in look(make_spec(QWEN3_235B), 4).options)


def test_the_survey_is_the_same_each_time():
    spec = make_spec(QWEN3_30B)
    assert look(spec, 8).options == look(spec, 8).options


def test_candidates_are_all_sizes_once():
    dense, mixed = list(candidates(SPEC, 4)), list(candidates(make_spec(QWEN3_30B), 4))
    assert [str(sizes) for sizes in dense] == [
        "--tp 4", "--tp 4 --sp on", "--tp 2 --cp 2", "--tp 2 --cp 2 --sp on", "--cp 4",
        "--pp 2 --tp 2", "--pp 2 --tp 2 --sp on", "--pp 2 --cp 2", "--pp 4",
    ]  # fmt: skip
    assert len(set(mixed)) == len(mixed) and set(dense) <= set(mixed)
    assert Sizes(tp=2, cp=2, ep=2, moe_dp=2, experts="dispatched") in mixed


def test_the_best_of_each_five_sizes():
    found = look(make_spec(QWEN3_30B), 8)
    folded = found.folded()
    sizes = [option.sizes[:5] for option in folded]
    assert len(set(sizes)) == len(sizes) == len({option.sizes[:5] for option in found.options})
    assert folded[0] is found.options[0]


def test_named_sizes_are_kept():
    found = look(make_spec(QWEN3_30B), 8, tp=2, experts="dispatched")
    assert found.options and all((option.sizes.tp, option.sizes.experts) == (2, "dispatched") for option in found.options)
    by_hand = look(make_spec(QWEN3_30B), 4, Settings(model="/m", pipeline_parallel_size=2, layer_cut=[20, 28]), pp=2)
    assert {option.plan.layer_cut for option in by_hand.options} == {(20, 28)}


def test_a_row_threshold_of_the_user_is_kept():
    settings = Settings(model="/m", sequence_parallel=100)
    assert Sizes(tp=2, sp=True).settings(settings).sequence_parallel == 100
    assert Sizes(tp=2).settings(settings).sequence_parallel == "off"
    assert Sizes(tp=2, sp=True).settings(SETTINGS).sequence_parallel == "on"


def test_distance_is_in_doublings():
    assert Sizes(tp=8).distance(Sizes(tp=2)) == 2
    assert Sizes(pp=2, tp=4).distance(Sizes(tp=8)) == 2
    assert Sizes(tp=3, cp=2).distance(Sizes(tp=2, cp=3)) == pytest.approx(2 * log2(1.5))
    assert 0 < Sizes(tp=2, sp=True).distance(Sizes(tp=2)) < 1


def test_the_nearest_legal_plan_changes_least():
    """SmolLM2-135M has nine heads: six ranks cannot share them, three can; of pp2 and cp2 beside them pp2 serves better."""
    refused = {str(each.sizes): str(each.nearest) for each in look(SPEC, 6).refused}
    assert refused["--tp 6"] == "--pp 2 --tp 3"
    assert refused["--pp 3 --tp 2"] == "--pp 2 --tp 3"


def test_where_nothing_is_legal_nothing_is_near():
    """Five devices in one stage: neither heads nor columns fall into five parts."""
    [refused] = look(SPEC, 5, tp=5).refused
    assert refused.nearest is None and refused.refusal.what == "tp=5 does not divide 9 query heads"
