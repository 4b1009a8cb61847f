"""Balancer: what a stage that pushes is offered, over the life of both; each hole of facts/seeds.md 5.10 that is the service's own."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from trireme.core.control import Offer, Push
from trireme.core.refusal import Refusal
from trireme.core.settings import Eplb
from trireme.engine.balancer import Balancer, StageExperts, exchange, initial_maps
from trireme.engine.eplb_file import Origin, write
from trireme.engine.placing import Slots, balance, held, trivial

SLOTS = Slots(num_experts=8, num_slots=12, num_ranks=4)
LAYERS = ("0", "1", "2", "3", "mtp")
ROW_S = (1 << 20) / 100e12
EXPERTS = StageExperts(LAYERS, SLOTS, expert_bytes=1 << 20, row_s=ROW_S, on_gpus=True)
ORIGIN = Origin.of(b"{}", "tp4 ep4")
EVEN = np.ones((len(LAYERS), 8), np.int32)  # so few rows that no move pays
SKEWED = np.tile(np.array([90_000, 50_000, 30_000, 9000, 3000, 1000, 1000, 1000], np.int32), (len(LAYERS), 1))


@dataclass
class Stage:
    """A stage as far as the service sees it: takes offers at once, or `late`, or not at all; has maps of its own to compare."""

    balancer: Balancer
    number: int = 0
    version: int = 0
    step: int = 0
    now: float = 0.0
    maps: dict[int, np.ndarray] = field(default_factory=lambda: {layer: trivial(SLOTS) for layer in range(len(LAYERS))})
    ready: Offer | None = None

    def push(self, loads: np.ndarray = EVEN, *, take: bool = True, fault: str = "", stalled_s: float = 0.0) -> Offer:
        """Ten steps, then a push; takes what it is offered by its next one."""
        self.step, self.now = self.step + 10, self.now + 1
        moved, took = 0, 0.0
        if self.ready is not None:
            for layer, packed in self.ready.maps.items():
                self.maps[layer] = np.frombuffer(packed, np.int32)
            self.version, self.ready, moved = self.ready.version, None, 7
            took = stalled_s
        push = Push(
            self.number,
            self.step,
            self.version,
            loads.tobytes(),
            num_steps=10,
            moved_bytes=moved,
            fault=fault,
            stalled_s=took,
        )
        offer = self.balancer.push(push, self.now)
        if offer.version and take:
            assert offer.version == self.version + 1
            self.ready = offer
        return offer

    def seen(self) -> dict:
        return self.balancer.query(self.now)["stages"][self.number]

    def knows(self) -> bool:
        """Whether the service has the stage's maps as they are."""
        return [layer["map"] for layer in self.seen()["layers"]] == [self.maps[layer].tolist() for layer in range(len(LAYERS))]


def a_stage(stages=(EXPERTS,), **eplb: Any) -> Stage:
    eplb = {"num_redundant_experts": 4, "interval": 100, "layers_per_step": 2, **eplb}
    return Stage(Balancer(Eplb(**eplb), stages, ORIGIN, now=0.0))


def proven(stage: Stage) -> Stage:
    """Past its self-test."""
    while stage.seen()["self_test"] != "passed":
        stage.push()
    return stage


def test_self_test_swaps_two_and_back():
    """A rebalance of two slots when serving begins, whatever the loads (SGLang's first one crashed after 1000 passes)."""
    stage = a_stage()
    first = stage.push()
    assert (first.version, list(first.maps)) == (1, [0])
    swapped = np.frombuffer(first.maps[0], np.int32)
    assert (swapped != trivial(SLOTS)).sum() == 2
    back = stage.push()
    assert (back.version, np.frombuffer(back.maps[0], np.int32).tolist()) == (2, trivial(SLOTS).tolist())
    assert stage.push() == Offer()
    seen = stage.seen()
    assert (seen["self_test"], seen["version"], seen["num_commits"], seen["moved_bytes"]) == ("passed", 2, 2, 14)
    assert [(event["reason"], event["step"] - event["offered"]) for event in seen["history"]] == [("self-test", 10)] * 2
    assert stage.knows()


def test_even_loads_move_nothing():
    stage = proven(a_stage())
    assert all(stage.push() == Offer() for _ in range(40))


@pytest.mark.parametrize("policy", ["auto", "hierarchical", "global", "skew", "minimal"])
def test_skewed_loads_are_balanced_a_few_layers_at_a_time(policy):
    stage = proven(a_stage(policy=policy))
    offers = [offer for _ in range(40) if (offer := stage.push(SKEWED)).version]
    assert all(len(offer.maps) <= 2 for offer in offers)
    assert sorted(layer for offer in offers for layer in offer.maps)[: len(LAYERS)] == list(range(len(LAYERS)))
    assert stage.knows()
    for map_ in stage.maps.values():
        assert balance(map_, SKEWED[0], SLOTS) > 0.8 > 0.7 > balance(trivial(SLOTS), SKEWED[0], SLOTS)
    event = stage.seen()["history"][-1]
    assert (event["reason"], event["moved_bytes"]) == ("balance", 7) and event["balance_before"] < event["balance_after"]
    assert not any(stage.push(SKEWED).version for _ in range(40)), "loads as before move nothing more"


def test_nothing_is_offered_before_an_interval_is_over():
    stage = a_stage(interval=200)
    offers = [stage.push(SKEWED).version for _ in range(20)]
    assert [number for number, version in enumerate(offers) if version] == [0, 1, 19]


def test_only_layers_that_gain_move():
    loads = EVEN.copy()
    loads[3] = SKEWED[3]
    stage = proven(a_stage(num_redundant_experts=0, stages=(StageExperts(LAYERS, SLOTS._replace(num_slots=8), 1 << 20, ROW_S),)))
    offers = [offer for _ in range(40) if (offer := stage.push(loads)).version]
    assert {layer for offer in offers for layer in offer.maps} == {3}


def test_a_move_must_pay():
    """A few rows are not worth an expert's way over a link, however unevenly they fall; a larger min_gain is none of the rows'."""
    few = (SKEWED // 1000).astype(np.int32)
    stage = proven(a_stage(interval=100))
    assert not any(stage.push(few).version for _ in range(40))
    stage = proven(a_stage(min_gain=0.9))
    assert not any(stage.push(SKEWED).version for _ in range(40))


@pytest.mark.parametrize(("rows", "read_s", "moves"), [(1000, 0.0, True), (1000, 200 * ROW_S, False), (90_000, 200 * ROW_S, True)])
def test_where_steps_wait_for_weights_evenness_of_rows_saves_nothing(rows, read_s, moves):
    """Up to 100 rows of an expert in a step, or 9000, where reading it takes as long as 200 rows through it; and people see why."""
    loads = SKEWED // (90_000 // rows)
    stage = proven(a_stage(interval=1000, stages=(EXPERTS._replace(read_s=read_s),)))
    offered = [offer for _ in range(150) if (offer := stage.push(loads)).version]
    assert bool(offered) == moves
    for layer in stage.seen()["layers"]:
        assert (layer["balance"]["1000"] > 0.8) == moves
        if moves:
            assert layer["gain"] is None, "not judged since it moved"
        else:
            assert layer["gain"] == pytest.approx(0, abs=0.01) and layer["reading"] == 1


@pytest.mark.parametrize("stalled_s", [0.0, 1e-4, 60.0])
def test_a_move_that_made_steps_wait_is_not_made_again_for_little(stalled_s):
    """What steps waited counts, not what is assumed; the self-test's, of two experts, does not."""
    stage = a_stage(interval=100)
    while stage.seen()["self_test"] != "passed":
        stage.push(stalled_s=3600.0)
    assert [stage.push(SKEWED, stalled_s=stalled_s).version for _ in range(40)].count(0) < 40
    assert any(stage.push(SKEWED[:, ::-1].copy(), stalled_s=stalled_s).version for _ in range(40)) == (stalled_s < 1)


def test_what_steps_wait_on_cpus_costs_nothing():
    stage = proven(a_stage(stages=(EXPERTS._replace(on_gpus=False),)))
    assert any(stage.push(SKEWED, stalled_s=60.0).version for _ in range(40))
    assert any(stage.push(SKEWED[:, ::-1].copy(), stalled_s=60.0).version for _ in range(40))


def test_without_min_gain_every_look_moves():
    stage = proven(a_stage(min_gain=0.0, interval=10, layers_per_step=8))
    stage.push()
    versions = [stage.push().version for _ in range(6)]
    assert versions == list(range(versions[0], versions[0] + 6)) and versions[0] > 2


def test_an_open_offer_is_made_once():
    stage = a_stage()
    offer = stage.push(take=False)
    assert offer.version and not any(stage.push(take=False).version for _ in range(20))
    stage.now += 60
    assert stage.push() == offer, "after a minute the same again, for it may be lost"
    assert stage.push().version == 2


def test_a_fault_drops_the_offer_and_it_is_tried_again_later():
    stage = a_stage()
    stage.push(take=False)
    assert stage.push(fault="rank 3: checksum of expert 5") == Offer()
    seen = stage.seen()
    assert (seen["num_faults"], seen["last_fault"], seen["version"]) == (1, "rank 3: checksum of expert 5", 0)
    assert seen["self_test"].startswith("failed: rank 3")
    versions = [stage.push().version for _ in range(12)]
    assert [number for number, version in enumerate(versions) if version] == [9, 10], "after an interval, there and back"
    assert stage.seen()["self_test"] == "passed" and stage.knows()


def test_a_stage_that_starts_again_gets_its_maps_back():
    """It begins with version 0 and the initial maps; what it had is offered at once, only layers that differ."""
    stage = proven(a_stage(layers_per_step=8))
    loads = EVEN.copy()
    loads[1] = loads[4] = SKEWED[1]
    while stage.seen()["num_commits"] < 3:
        stage.push(loads)
    had = dict(stage.maps)
    again = Stage(stage.balancer, now=stage.now)
    offer = again.push(loads)
    assert offer.version == 1 and set(offer.maps) >= {1, 4}
    again.push(loads)
    assert again.knows() and all((again.maps[layer] == had[layer]).all() for layer in range(len(LAYERS)))
    assert again.seen()["history"][-1]["reason"] == "restore"


def test_initial_maps_that_changed_meanwhile(tmp_path):
    """The file of initial maps is that in which the service saves: a stage that starts later reads others than the service did."""
    a_stage().balancer.save(tmp_path)
    stage = proven(a_stage(initial_map=str(tmp_path / "eplb.safetensors")))
    while stage.seen()["num_commits"] < 5:
        stage.push(SKEWED)
    again = Stage(stage.balancer, now=stage.now, maps=dict(stage.maps))
    stage.balancer.save(tmp_path)
    for _ in range(8):
        again.push()
    assert again.knows() and (again.maps[0] != trivial(SLOTS)).any()


def test_a_service_that_starts_again_disturbs_nobody():
    """Without a saved state it does not know the stage's maps: it says so, gathers loads, then gives whole ones."""
    stage = proven(a_stage())
    while stage.seen()["num_commits"] < 5:
        stage.push(SKEWED)
    stage.balancer = a_stage().balancer
    assert not any(stage.push(SKEWED).version for _ in range(9))
    assert (stage.seen()["balance"]["10"], stage.seen()["layers"][0]["map"]) == (None, None)
    for _ in range(30):
        stage.push(SKEWED)
    assert stage.knows() and stage.seen()["balance"]["10"] > 0.8 and stage.seen()["self_test"] == "passed"


def test_saved_state_goes_on(tmp_path):
    stage = proven(a_stage())
    for _ in range(20):
        stage.push(SKEWED)
    before = stage.seen()
    stage.balancer.save(tmp_path)
    assert json.loads((tmp_path / "eplb.json").read_text()) == [before["history"]]
    fresh = a_stage().balancer
    assert not a_stage().balancer.load(tmp_path / "nothing") and fresh.load(tmp_path)
    stage.balancer = fresh
    after = stage.seen()
    same = ("version", "balance", "moved_bytes", "history", "self_test", "age_s")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    nothing_judged = {"gain": None, "reading": None}
    assert after["layers"] == [layer | nothing_judged for layer in before["layers"]]
    assert stage.push(SKEWED) == Offer()


def test_state_of_another_model_or_plan_is_refused(tmp_path):
    a_stage().balancer.save(tmp_path)
    for origin, part in ((Origin.of(b"[]", "tp4 ep4"), "model"), (Origin.of(b"{}", "tp2 ep2"), "plan")):
        with pytest.raises(Refusal, match=f"is of another {part}.*fix: move it away"):
            Balancer(Eplb(num_redundant_experts=4), [EXPERTS], origin, now=0.0).load(tmp_path)


def test_initial_maps_of_files(tmp_path):
    """Saved maps as they are; of recorded loads, which any plan may use, what the policy makes of them."""
    stage = proven(a_stage())
    stage.balancer.recorder.start("per_pass")
    for _ in range(20):
        stage.push(SKEWED)
    stage.balancer.save(tmp_path)
    stage.balancer.dump(tmp_path / "loads.safetensors")
    saved = initial_maps(Eplb(initial_map=str(tmp_path / "eplb.safetensors")), [EXPERTS], ORIGIN)[0]
    assert saved.tolist() == [stage.maps[layer].tolist() for layer in range(len(LAYERS))]
    other = StageExperts(LAYERS, SLOTS._replace(num_slots=10, num_ranks=2), 1)
    made = initial_maps(Eplb(initial_map=str(tmp_path / "loads.safetensors")), [other], Origin.of(b"{}", "tp2 ep2"))[0]
    assert made.shape == (len(LAYERS), 10) and balance(made, SKEWED, other.slots) > 0.9
    with pytest.raises(Refusal, match="plan"):
        initial_maps(Eplb(initial_map=str(tmp_path / "eplb.safetensors")), [EXPERTS], Origin.of(b"{}", "tp2 ep2"))
    with pytest.raises(Refusal, match=r"no loads of stage 1"):
        initial_maps(Eplb(initial_map=str(tmp_path / "loads.safetensors")), [EXPERTS, EXPERTS], ORIGIN)
    with pytest.raises(Refusal, match="is missing"):
        initial_maps(Eplb(initial_map=str(tmp_path / "none")), [EXPERTS], ORIGIN)
    (tmp_path / "text").write_text("maps")
    with pytest.raises(Refusal, match="is no file of expert loads"):
        initial_maps(Eplb(initial_map=str(tmp_path / "text")), [EXPERTS], ORIGIN)
    write(tmp_path / "poor", ORIGIN, {"stage_0.maps": np.zeros((5, 12), np.int32)})
    with pytest.raises(Refusal, match="does not have every expert"):
        initial_maps(Eplb(initial_map=str(tmp_path / "poor")), [EXPERTS], ORIGIN)
    write(tmp_path / "short", ORIGIN, {"stage_0.maps": np.zeros((5, 4), np.int32)})
    with pytest.raises(Refusal, match="5 x 12: its own are 5 x 4"):
        initial_maps(Eplb(initial_map=str(tmp_path / "short")), [EXPERTS], ORIGIN)


def test_stages_have_maps_and_versions_of_their_own():
    stages = [a_stage(stages=(EXPERTS, EXPERTS))]
    stages.append(Stage(stages[0].balancer, number=1))
    for stage in stages:
        proven(stage)
    for _ in range(30):
        stages[0].push(EVEN)
        stages[1].push(SKEWED)
    assert (stages[0].seen()["version"], stages[1].seen()["version"] > 2) == (2, True)
    assert all(stage.knows() for stage in stages)


def test_pushes_that_fit_nothing_are_refused():
    stage = a_stage(stages=(EXPERTS, StageExperts((), SLOTS, 1)))
    with pytest.raises(Refusal, match="stage 0 pushed 39 loads for 5 layers of 8 experts"):
        stage.balancer.push(Push(0, 10, 0, EVEN.tobytes()[4:]), 0.0)
    for number in (1, 2):
        with pytest.raises(Refusal, match=f"stage {number} has no experts"):
            stage.balancer.push(Push(number, 10, 0, b""), 0.0)


def test_query_is_json():
    stage = proven(a_stage(stages=(EXPERTS, StageExperts((), SLOTS, 1))))
    for _ in range(30):
        stage.push(SKEWED)
    seen = json.loads(json.dumps(stage.balancer.query(stage.now)))
    assert seen["settings"]["interval"] == 100 and seen["origin"]["plan"] == ORIGIN.plan
    assert seen["stages"][0]["age_s"] > 0 and seen["stages"][1]["layers"] == []


def test_exchange_makes_no_twins():
    map_ = np.array([0, 1, 2, 0, 1, 3])
    swapped = exchange(map_, Slots(4, 6, 2))
    assert swapped is not None and (swapped != map_).sum() == 2 and held(swapped, Slots(4, 6, 2)).max() == 1
    assert exchange(np.array([0, 1, 0, 1]), Slots(2, 4, 2)) is None
