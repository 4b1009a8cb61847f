"""Communication schedules: what each rank sends, in which order, is an expected value; a regression is a text diff. And the
bytes: counted on the tensors that are sent, they are what the planner predicts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chained import Chained
from plans.grid import MOE, SIZES
from tiny import random_prompts, tiny_checkpoint
from trireme.core.step import Regime
from trireme.models.schedule import schedule_of
from trireme.models.spec import Spec, read_spec
from trireme.models.wire import edge_bytes, stage_wire
from trireme.parallel.deal import Deal
from trireme.parallel.plan import Plan

EXPECTED = Path(__file__).parent / "schedules"
ITEM_BYTES = 4

PLANS = {
    "qwen3 tp2": Plan(layer_cut=(4,), tp=2),
    "qwen3 pp2 tp2 sp": Plan(layer_cut=(2, 2), tp=2, sp=True),
    "qwen3 pp2 cp2": Plan(layer_cut=(2, 2), cp=2),
    "qwen3 tp2 cp2 sp": Plan(layer_cut=(4,), tp=2, cp=2, sp=True),
    "qwen3_moe tp4 ep2": Plan(layer_cut=(4,), tp=4, ep=2),
    "qwen3_moe tp2 cp2 moe_dp2 ep2": Plan(layer_cut=(4,), tp=2, cp=2, ep=2, moe_dp=2),
    "qwen3_moe pp2 tp2 cp2 ep4 sp": Plan(layer_cut=(2, 2), tp=2, cp=2, ep=4, sp=True),
    "qwen3_moe tp4 ep2 dispatched sp": Plan(layer_cut=(4,), tp=4, ep=2, sp=True, experts="dispatched"),
    "qwen3_5 pp2 cp2": Plan(layer_cut=(1, 3), cp=2),
    "qwen3_5_moe tp2 cp2 ep4 sp": Plan(layer_cut=(4,), tp=2, cp=2, ep=4, sp=True),
}
DRAFTING = {"qwen3_next pp2 tp2 ep2 sp mtp3": Plan(layer_cut=(2, 2), tp=2, ep=2, sp=True, mtp=3)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    families = sorted({name.split()[0] for name in PLANS | DRAFTING})
    return {family: tiny_checkpoint(root / family, family, **SIZES) for family in families}


def text_of(spec: Spec, plan: Plan) -> str:
    lines = []
    for stage, num_layers in enumerate(plan.layer_cut):
        lines += [f"stage {stage}, {num_layers} layers", *(f"  {line}" for line in schedule_of(spec, plan, stage))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", PLANS | DRAFTING)
def test_schedules_are_as_written_down(folders, name):
    family = name.split()[0]
    found, wanted = text_of(read_spec(folders[family]), (PLANS | DRAFTING)[name]), (EXPECTED / f"{name}.txt").read_text()
    assert found.splitlines() == wanted.splitlines()


def calls_of(schedule: list[str], regime: Regime) -> list[str]:
    """The collectives under one heading of a schedule, in order. Slices are no calls."""
    start = schedule.index(str(regime)) + 1
    lines = []
    for line in schedule[start:]:
        if not line.startswith(" "):
            break
        lines += line.split(maxsplit=1)[1].split(", ")
    return [call for call in lines if not call.startswith("slice")]


@pytest.mark.parametrize("name", PLANS)
def test_what_is_sent_is_what_is_scheduled_and_predicted(folders, name):
    """Each rank of each regime. 32 rows: every cut divides them, so the prediction is exact but for how tokens choose experts."""
    family, plan = name.split()[0], PLANS[name]
    spec = read_spec(folders[family])
    for regime in plan.regimes:
        chained = Chained(folders[family], plan)
        chained.forward(dict(enumerate(random_prompts([16, 8, 8]))), regime=regime)
        for stage, boards in enumerate(chained.boards):
            predicted, sent = stage_wire(spec, plan, stage, 32, regime, ITEM_BYTES, num_items=3), []
            for rank, decoder in enumerate(chained.decoders[stage]):
                traffic = boards.traffic[rank]
                assert traffic.calls == calls_of(decoder.schedule(), regime)
                assert len(traffic.calls) == predicted.calls
                sent.append(traffic.num_bytes)
                edge = decoder.num_edge_rows(Deal(plan, rank, np.array([16, 8, 8]), regime)) * spec.hidden * ITEM_BYTES
                assert edge == edge_bytes(spec, plan, 32, regime, ITEM_BYTES)
            if plan.experts == "dispatched":
                # routers are not even: what is predicted is their mean, which is between the ranks' least and most
                assert min(sent) <= predicted.num_bytes * 1.25 and max(sent) >= predicted.num_bytes * 0.75
            else:
                assert sent == pytest.approx([predicted.num_bytes] * plan.ranks)


@pytest.mark.parametrize("family", ["qwen3", *MOE])
def test_sp_sends_no_more_than_tp_and_its_edges_carry_a_share(tmp_path, family):
    folder = tiny_checkpoint(tmp_path, family, **SIZES)
    plan, counts, sent, edges = Plan(layer_cut=(2, 2), tp=4, sp=True), np.array([16, 16]), {}, {}
    for regime in plan.regimes:
        chained = Chained(folder, plan)
        chained.forward(dict(enumerate(random_prompts(counts.tolist()))), regime=regime)
        sent[regime.sp] = sum(traffic.num_bytes for boards in chained.boards for traffic in boards.traffic.values())
        edges[regime.sp] = [decoder.num_edge_rows(Deal(plan, rank, counts, regime)) for rank, decoder in enumerate(chained.decoders[1])]
    assert sent[True] <= sent[False] * (1 + 1e-9)
    assert edges == {False: [32] * 4, True: [8] * 4}
