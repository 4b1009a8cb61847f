"""Settings on the command line: every one of them, spelt as in the file or shorter, and checked the same."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from trireme.core.refusal import Refusal
from trireme.core.settings import Eplb, Mtp, Settings
from trireme_tools.settings_options import FLAGS, override, settings_of_words, settings_options


def chosen_by(*words: str) -> dict:
    got = {}

    @settings_options
    def verb(name: str = "x", *, chosen: dict) -> None:
        """A verb."""
        got.update(chosen, name=name)

    app = typer.Typer()
    app.command()(verb)
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return got


def test_every_setting_has_a_flag():
    groups = {"mtp": Mtp, "eplb": Eplb}
    grouped = {f"{group}.{name}" for group, kind in groups.items() for name in kind.__struct_fields__}
    assert set(FLAGS) == set(Settings.__struct_fields__) - {"model", *groups} | grouped


def test_only_what_was_said_is_chosen():
    assert chosen_by("--name", "y") == {"name": "y"}
    words = ("--pp", "2", "--layer-cut", "16,14", "--link", "tensor", "--no-enable-prefix-caching", "--step-timeout-s", "2.5")
    expected = {"pipeline_parallel_size": 2, "layer_cut": [16, 14], "link": "tensor", "enable_prefix_caching": False, "step_timeout_s": 2.5}
    assert chosen_by(*words) == {"name": "x", **expected}
    words = ("--tp", "2", "--cp", "2", "--ep", "4", "--moe-dp", "1", "--sp", "64", "--experts", "dispatched", "--devices", "0,1;2,3")
    expected = {
        "tensor_parallel_size": 2,
        "context_parallel_size": 2,
        "expert_parallel_size": 4,
        "moe_data_parallel_size": 1,
        "sequence_parallel": 64,
        "experts": "dispatched",
        "devices": [[0, 1], [2, 3]],
    }
    assert chosen_by(*words) == {"name": "x", **expected}
    assert chosen_by("--sp", "on")["sequence_parallel"] == "on"
    words = ("--tensor-parallel-size", "2", "--sequence-parallel", "on", "--mtp-num-tokens", "2", "--eplb-policy", "global")
    assert chosen_by(*words) == chosen_by("--tp", "2", "--sp", "on", "--mtp", "2", "--eplb", "global")


def test_a_group_of_settings_keeps_what_was_not_chosen():
    chosen = chosen_by("--mtp", "2", "--no-mtp-adaptive")
    assert chosen == {"name": "x", "mtp": {"num_tokens": 2, "adaptive": False}}
    settings = override(Settings(model="m", mtp=Mtp(max_batch_size=7)), {"mtp": chosen["mtp"]})
    assert settings.mtp == Mtp(num_tokens=2, adaptive=False, max_batch_size=7)
    assert override(settings, {"mtp": chosen_by("--mtp", "0")["mtp"]}).mtp.num_tokens == 0
    assert override(settings, {"async_depth": 2}).mtp == settings.mtp
    assert override(settings, {"async_depth": 2}).eplb is None
    assert override(settings, {"eplb": chosen_by("--eplb", "global")["eplb"]}).eplb == Eplb(policy="global")
    assert chosen_by("--eplb-num-redundant-experts", "4", "--eplb-initial-map", "trivial")["eplb"] == {
        "num_redundant_experts": 4,
        "initial_map": "trivial",
    }
    with pytest.raises(Refusal, match="mtp asks for 99 drafts"):
        override(settings, {"mtp": {"num_tokens": 99}})


def test_a_bad_choice_is_refused_as_in_the_file():
    with pytest.raises(Refusal, match="bad setting"):
        override(Settings(model="m"), {"link": "pigeon"})
    with pytest.raises(Refusal, match="layer cut"):
        chosen_by("--layer-cut", "a,b")
    with pytest.raises(Refusal, match="devices '0,1;' are not numbers"):
        chosen_by("--devices", "0,1;")
    with pytest.raises(Refusal, match="sequence_parallel='sometimes'"):
        override(Settings(model="m"), {"sequence_parallel": chosen_by("--sp", "sometimes")["sequence_parallel"]})


def test_another_pp_forgets_the_cut_of_the_file():
    settings = Settings(model="m", pipeline_parallel_size=2, layer_cut=[1, 2])
    assert override(settings, {"pipeline_parallel_size": 3}).layer_cut is None
    assert override(settings, {"async_depth": 2}).layer_cut == [1, 2]


def test_other_sizes_forget_the_devices_of_the_file():
    settings = Settings(model="m", tensor_parallel_size=2, devices=[[0, 1]])
    assert override(settings, {"tensor_parallel_size": 1}).devices is None
    assert override(settings, {"context_parallel_size": 1, "devices": [[2, 3]]}).devices == [[2, 3]]
    assert override(settings, {"async_depth": 2}).devices == [[0, 1]]


def test_words_of_a_plan():
    one = settings_of_words("one")
    assert override(Settings(model="m"), one) == Settings(model="m", mtp=Mtp(num_tokens=0))
    busy = override(Settings(model="m", tensor_parallel_size=4), settings_of_words("pp2 cp2 moe_dp2 ep2 sp dispatched tensor mtp3"))
    sizes = (busy.pipeline_parallel_size, busy.tensor_parallel_size, busy.context_parallel_size, busy.expert_parallel_size)
    assert sizes == (2, 1, 2, 2) and busy.moe_data_parallel_size == 2
    assert (busy.sequence_parallel, busy.experts, busy.link, busy.mtp.num_tokens) == ("on", "dispatched", "tensor", 3)
    balanced = override(busy, settings_of_words("tp2 ep2 dispatched eplb4 static"))
    assert balanced.eplb == Eplb(num_redundant_experts=4, dispatch="static") and override(balanced, one).eplb is None
    assert override(Settings(model="m"), settings_of_words("eplb")).eplb == Eplb()
    for word in ("pp", "sp2", "xx4", "experts2", "2", "static"):
        with pytest.raises(Refusal, match="is no word of a plan"):
            settings_of_words(f"tp2 {word}")
