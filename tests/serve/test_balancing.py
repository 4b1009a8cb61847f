"""Balancing: what the service knows of a checkpoint and a plan, what it answers to people, and what it keeps on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tiny import tiny_checkpoint
from trireme.core.control import Push
from trireme.core.refusal import Refusal
from trireme.core.settings import Settings, make_settings
from trireme.core.step import ints
from trireme.engine.placing import trivial
from trireme.models.spec import read_spec
from trireme.serve.balancing import Balancing, experts_of, first_maps, origin_of

PLAN = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 2, "layer_cut": [2, 3]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("mixture"), "qwen3_moe", num_attention_heads=12, num_key_value_heads=2)


def settings(checkpoint, **eplb) -> Settings:
    values = {"num_redundant_experts": 2, "interval": 1, "min_gain": -1.0, **eplb}
    return make_settings({"model": str(checkpoint), "dtype": "float32", **PLAN, "eplb": values})


class Stages:
    """Two stages that take every offer, of which the service hears with their next push; `version` and `maps` by stage."""

    def __init__(self):
        self.version, self.number = [0, 0], 0
        self.maps = [[np.arange(10) % 8] * 1, [np.arange(10) % 8] * 3]
        self.rng = np.random.default_rng(0)

    def push(self, balancing: Balancing, times: int = 1, *, takes: bool = True) -> None:
        for _ in range(times):
            self.number += 1
            for stage, maps in enumerate(self.maps):
                loads = ints(self.rng.integers(0, 100, (len(maps), 8)))
                offer = balancing.push(Push(stage, self.number, self.version[stage], loads))
                if offer.maps and takes:
                    assert offer.version == self.version[stage] + 1
                    self.version[stage] = offer.version
                    for layer, packed in offer.maps.items():
                        maps[layer] = np.frombuffer(packed, np.int32)


def maps_of(balancing: Balancing) -> list[list[list[int]]]:
    return [[layer["map"] for layer in stage["layers"]] for stage in balancing.query("map")["stages"]]


def test_layers_of_each_stage(checkpoint):
    """The tiny model's layer 1 is dense; float32 experts of three matrices 48 x 20."""
    found = experts_of(settings(checkpoint), read_spec(checkpoint))
    assert [experts.layers for experts in found] == [("0",), ("2", "3", "4")]
    assert found[0].slots[:3] == (8, 10, 2) and found[0].expert_bytes == 3 * 48 * 20 * 4


def test_the_head_that_drafts_is_a_layer_of_the_last_stage(tmp_path):
    drafts = tiny_checkpoint(tmp_path, "qwen3_5_moe", num_key_value_heads=2, num_attention_heads=12)
    stages = experts_of(settings(drafts), read_spec(drafts))
    assert stages[0].layers == ("0", "1") and stages[1].layers == ("2", "3", "4", "mtp")


def test_queries(checkpoint):
    balancing, stages = Balancing(settings(checkpoint)), Stages()
    stages.push(balancing, 8)
    stages.push(balancing, takes=False)
    state = balancing.query("state")
    json.dumps(state)
    assert [stage["version"] for stage in state["stages"]] == stages.version and min(stages.version) > 2
    assert maps_of(balancing) == [[map_.tolist() for map_ in maps] for maps in stages.maps]
    loads = balancing.query("loads")["stages"][1]
    assert [layer["layer"] for layer in loads["layers"]] == ["2", "3", "4"] and len(loads["layers"][0]["loads"]) == 8
    assert len(loads["layers"][0]["rank_loads"]) == 2
    assert balancing.query("history")["stages"][0]["history"]
    assert set(balancing.query("balance")["stages"][0]["balance"]) == {"10", "100", "1000"}
    with pytest.raises(Refusal, match="ask one of state, map"):
        balancing.query("weather")


def test_records_go_to_the_folder_and_back_as_first_maps(checkpoint, tmp_path):
    balancing, stages = Balancing(settings(checkpoint, state=str(tmp_path))), Stages()
    assert balancing.query("start per_pass")["mode"] == "per_pass"
    stages.push(balancing, 3)
    assert balancing.query("stop")["num_pushes"] == 6
    file = balancing.query("dump")["file"]
    maps = first_maps(settings(checkpoint, initial_map=file), read_spec(checkpoint))
    assert any(maps) and all(set(map_.tolist()) == set(range(8)) and len(map_) == 10 for of_stage in maps for map_ in of_stage.values())
    with pytest.raises(Refusal, match=r"eplb\.state is not set"):
        Balancing(settings(checkpoint)).query("dump")
    for words, why in {
        "start everything": "no such mode",
        "start per_token many": "no limit of memory",
        "start per_token 64 MiB": "too many words",
        "stop it": "too many words",
    }.items():
        with pytest.raises(Refusal, match=why):
            balancing.query(words)


def test_first_maps_are_trivial(checkpoint):
    assert first_maps(settings(checkpoint), read_spec(checkpoint)) == [{}, {}]


def test_maps_outlive_the_service(checkpoint, tmp_path):
    """Saved at each change; stages that start again get them back, and have then what they had."""
    here = settings(checkpoint, state=str(tmp_path), min_gain=0.0)
    balancing, stages = Balancing(here), Stages()
    stages.push(balancing, 12)
    balancing.save()
    had = maps_of(balancing)
    assert any(map_ != trivial(experts_of(here, read_spec(checkpoint))[0].slots).tolist() for maps in had for map_ in maps)
    again, fresh = Balancing(here), Stages()
    assert maps_of(again) == had
    frozen = settings(checkpoint, state=str(tmp_path), min_gain=0.99)
    again = Balancing(frozen)
    fresh.push(again, 12)
    assert [[map_.tolist() for map_ in maps] for maps in fresh.maps] == had == maps_of(again)


def test_a_state_of_another_plan_is_left_alone(checkpoint, tmp_path):
    here = settings(checkpoint, state=str(tmp_path))
    balancing, stages = Balancing(here), Stages()
    stages.push(balancing, 4)
    balancing.save()
    other = settings(checkpoint, state=str(tmp_path), num_redundant_experts=4)
    assert origin_of(other, read_spec(checkpoint)) != origin_of(here, read_spec(checkpoint))
    assert [stage["version"] for stage in Balancing(other).query("map")["stages"]] == [0, 0]
    (tmp_path / "eplb.safetensors").write_bytes(b"half of a file")
    assert [stage["version"] for stage in Balancing(here).query("map")["stages"]] == [0, 0]
