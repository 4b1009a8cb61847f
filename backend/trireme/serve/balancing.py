"""Balancing: the service behind the model `eplb`, without the server: what the balancer must know of settings, its clock, its lock and
its folder. In the server serve/eplb has it; offline it is called from stage to service in one process."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np

from trireme.core.control import Offer, Push
from trireme.core.devices import place_ranks
from trireme.core.log import logger
from trireme.core.refusal import Refusal
from trireme.core.settings import Eplb, Settings
from trireme.engine.balancer import Balancer, StageExperts, initial_maps
from trireme.engine.eplb_file import Origin
from trireme.engine.loads import Mode
from trireme.engine.placing import Slots, trivial
from trireme.models.cost import Kind, Shares, layer_params
from trireme.models.hardware import DEVICES
from trireme.models.spec import ITEM_BYTES, Spec, read_spec
from trireme.models.work import Work
from trireme.parallel.plan import Plan

_SAVE_EVERY_S = 60.0
_VIEWS = {  # of a stage, by query; history and what a recorder does are their own
    "map": ("version", "offered", "num_slots", "num_ranks"),
    "loads": ("version", "num_pushes", "num_experts"),
    "balance": ("version", "balance", "age_s", "moved_bytes", "stalled_s", "self_test", "num_faults", "last_fault"),
    "history": ("version", "history"),
}
_LAYER_VIEWS = {"map": ("map",), "loads": ("loads", "rank_loads"), "balance": ("balance", "gain", "reading")}


class Balancing:
    """Thread-safe. Its maps and loads outlive it in `eplb.state`, where that is set."""

    def __init__(self, settings: Settings):
        eplb, spec = settings.eplb, read_spec(Path(settings.model))
        assert eplb is not None, "there is no service without it"
        self._log = logger("eplb")
        self._lock = threading.Lock()
        self._folder = Path(eplb.state) if eplb.state else None
        stages, origin = experts_of(settings, spec), origin_of(settings, spec)
        self._balancer = self._begin(eplb, stages, origin)
        self._saved_at = time.monotonic()
        self._saved_commits = self._balancer.num_commits

    def _begin(self, eplb: Eplb, stages: list[StageExperts], origin: Origin) -> Balancer:
        """With what was saved, where that is of this model and plan; else without: serving goes on whatever lies in the folder."""
        balancer = Balancer(eplb, stages, origin, time.time())
        try:
            if self._folder is not None and balancer.load(self._folder):
                self._log.info("goes on with the maps and loads of %s", self._folder)
            return balancer
        except Exception as error:  # a file of another plan, of another version, or half of one
            self._log.warning("begins without the state that was saved: %s", error)
            return Balancer(eplb, stages, origin, time.time())

    def push(self, push: Push) -> Offer:
        """A stage's loads and news; what it should prepare."""
        with self._lock:
            offer = self._balancer.push(push, time.time())
            if time.monotonic() - self._saved_at > _SAVE_EVERY_S or self._balancer.num_commits > self._saved_commits:
                self._save()
            return offer

    def query(self, words: str) -> dict[str, Any]:
        """What people and metrics ask: state, which is all there is to see, or of it map, loads, balance or history; and of the
        recorder start [stat|per_pass|per_token [MIB]], stop and dump. Refusal for anything else."""
        verb, *rest = words.split() or [""]
        if len(rest) > (2 if verb == "start" else 0):
            raise Refusal(f"query {words!r} has too many words", why="what they ask for would be ignored", fix=f"ask {verb!r} alone")
        with self._lock:
            recorder = self._balancer.recorder
            if verb == "start":
                recorder.start(cast(Mode, rest[0]) if rest else "stat", _mib(rest[1]) if rest[1:] else None)  # which it checks
            elif verb == "stop":
                recorder.stop()
            elif verb == "dump":
                return {"file": str(self._dump())}
            elif verb not in _VIEWS and verb != "state":
                fix = f"ask one of state, {', '.join(_VIEWS)}, start, stop and dump"
                raise Refusal(f"query {words!r}", why="there is no such query", fix=fix)
            whole = self._balancer.query(time.time())
        if verb in _VIEWS:
            return {"stages": [_view(stage, verb) for stage in whole["stages"]]}
        return whole if verb == "state" else whole["recording"]

    def save(self) -> None:
        with self._lock:
            self._save()

    def _save(self) -> None:
        self._saved_at, self._saved_commits = time.monotonic(), self._balancer.num_commits
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._balancer.save(self._folder)
        except OSError as error:  # a full disk is no reason to serve worse
            self._log.warning("maps and loads are not saved: %s", error)

    def _dump(self) -> Path:
        if self._folder is None:
            raise Refusal("nowhere to write the record", why="eplb.state is not set", fix="set it to a folder")
        path = self._folder / time.strftime("record-%Y%m%d-%H%M%S.safetensors")
        self._balancer.dump(path)
        return path


def _mib(word: str) -> int:
    if not word.isdecimal():
        why = "it is how many MiB of rows may be kept of each stage"
        raise Refusal(f"{word!r} is no limit of memory", why=why, fix='ask "start per_token 256"')
    return int(word)


def experts_of(settings: Settings, spec: Spec) -> list[StageExperts]:
    """Of each stage, the layers with experts in the order in which it reports them: the head's that drafts is last."""
    plan = Plan.of(settings, spec)
    item_bytes = spec.item_bytes if settings.dtype == "auto" else ITEM_BYTES[settings.dtype]
    expert = layer_params(spec, Kind(sparse=True), Shares.of(plan, spec)).expert
    slots = Slots(spec.num_experts, spec.num_experts + plan.num_redundant_experts, plan.ep)
    names = [[str(layer) for layer in plan.layers(stage) if spec.sparse[layer]] for stage in range(plan.pp)]
    if plan.mtp and spec.sparse[-1]:
        names[-1].append("mtp")
    on_gpus = place_ranks(settings) is not None
    device = DEVICES["H100" if on_gpus else "CPU"]  # what GPU it is this process cannot see; others' rates have nearly the same ratio
    row_s = Work(2 * expert, 0).seconds(device, item_bytes)
    read_s = Work(0, expert * item_bytes).seconds(device, item_bytes) if on_gpus else 0.0  # of a CPU only the order of magnitude is known
    return [StageExperts(tuple(layers), slots, expert * item_bytes, row_s, read_s, spec.num_experts_per_tok, on_gpus) for layers in names]


def first_maps(settings: Settings, spec: Spec) -> list[dict[int, np.ndarray]]:
    """The maps that each stage loads its experts by, int32 [num_slots], by the number of the layer; those that are trivial are left
    out. Refusal where `eplb.initial_map` names a file of another model."""
    assert settings.eplb is not None, "else there are none"
    stages = experts_of(settings, spec)
    every = initial_maps(settings.eplb, stages, origin_of(settings, spec))
    return [
        {layer: map_ for layer, map_ in enumerate(maps) if (map_ != trivial(experts.slots)).any()}
        for experts, maps in zip(stages, every, strict=True)
    ]


def origin_of(settings: Settings, spec: Spec) -> Origin:
    """Loads and maps mean the same where the checkpoint is, and where the same layers have slots on as many ranks."""
    stages = [f"{' '.join(experts.layers)}: {experts.slots}" for experts in experts_of(settings, spec)]
    return Origin.of((Path(settings.model) / "config.json").read_bytes(), "; ".join(stages))


def _view(stage: dict[str, Any], verb: str) -> dict[str, Any]:
    """The part of what a stage's query gives that `verb` is after."""
    names = _LAYER_VIEWS.get(verb, ())
    layers = {"layers": [{name: layer[name] for name in ("layer", *names)} for layer in stage["layers"]]} if names else {}
    return {name: stage[name] for name in ("stage", *_VIEWS[verb])} | layers
