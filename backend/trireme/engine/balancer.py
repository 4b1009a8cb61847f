"""Balancer: the brain of the model `eplb`. It takes what stages push, keeps loads and maps of each, and answers with the maps that they
should have. It has no clock, no threads and no server: time comes in, as seconds since 1970."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from trireme.core.control import Offer, Push
from trireme.core.maps import is_legal
from trireme.core.refusal import Refusal
from trireme.core.settings import Eplb
from trireme.core.told import COLUMNS
from trireme.engine import eplb_file
from trireme.engine.eplb_file import Contents, Origin
from trireme.engine.loads import WINDOWS, LoadWindows, Recorder
from trireme.engine.placing import Slots, balance, busy_s, held, place, rank_loads, received, trivial

# What decides whether a move pays, beside what a stage's experts take.
_BYTES_PER_S = 25e9  # from rank to rank: PCIe 4.0 x16, the slowest way between GPUs of a host; until moves have made steps wait
_MOVES = 8  # the latest, by which their way is judged

_PATIENCE_S = 60.0  # after which an offer without an answer is made once more
_SAVED_PUSHES = 100
_HISTORY = 200  # events of a stage


class StageExperts(NamedTuple):
    """The layers with experts of one stage."""

    layers: tuple[str, ...]  # their names in metrics, in the order of Push.loads: "0", "1", ..., "mtp"
    slots: Slots
    expert_bytes: int  # what a rank receives for one expert
    row_s: float = 0.0  # a row through an expert; as a data sheet has it
    read_s: float = 0.0  # an expert's weights, read by a step that has any rows for it
    num_chosen: int = 1  # experts of a row
    on_gpus: bool = False  # what steps wait on CPUs says nothing of what they would save on GPUs


def initial_maps(eplb: Eplb, stages: Sequence[StageExperts], origin: Origin) -> list[np.ndarray]:
    """The maps, int32 [layers, num_slots] of each stage, that weights are loaded by: version 0. `eplb.initial_map` is "trivial" or a
    file: its maps, or what the policy makes of its loads, which may be of another number of slots and ranks."""
    for experts in stages:
        experts.slots.check()
    plain = [np.tile(trivial(experts.slots), (len(experts.layers), 1)) for experts in stages]
    if eplb.initial_map == "trivial":
        return plain
    contents = eplb_file.read(Path(eplb.initial_map))
    with_maps = any(name.endswith(".maps") for name in contents.arrays)
    contents.check(origin, any_plan=not with_maps)
    found = []
    for stage, experts in enumerate(stages):
        if with_maps:
            maps = _take(contents, stage, "maps", (len(experts.layers), experts.slots.num_slots)).astype(np.int32)
            if not all(is_legal(map_, experts.slots.num_experts, experts.slots.num_slots) for map_ in maps):
                what = f"a map of stage {stage} in {contents.path} does not have every expert"
                raise Refusal(what, why="tokens that go to a missing one would be wrong", fix="use a file that the model `eplb` saved")
            found.append(maps)
            continue
        loads = _take(contents, stage, "loads", (len(experts.layers), experts.slots.num_experts))
        windows = loads if loads.ndim == 3 else loads[None]
        found.append(np.stack([place(eplb.policy, windows[:, layer], experts.slots) for layer in range(len(experts.layers))]))
    return found


class Balancer:
    """Loads, versions and maps of all stages."""

    def __init__(self, eplb: Eplb, stages: Sequence[StageExperts], origin: Origin, now: float):
        self.recorder = Recorder()
        self._eplb, self._origin = eplb, origin
        initial = initial_maps(eplb, stages, origin)
        self._stages = [_Stage(eplb, stage, experts, initial[stage], now) for stage, experts in enumerate(stages)]

    @property
    def num_commits(self) -> int:
        """How often maps changed since this began; when it rises it is time to save."""
        return sum(stage.num_commits for stage in self._stages)

    def push(self, push: Push, now: float) -> Offer:
        """Takes a stage's loads and news; answers with maps to prepare, version 0 and none where it is well as it is."""
        if not 0 <= push.stage < len(self._stages) or not self._stages[push.stage].experts.layers:
            what = f"stage {push.stage} has no experts that this service knows"
            raise Refusal(what, why=f"it knows {len(self._stages)} stage(s)", fix="give stages and `eplb` the same settings")
        stage = self._stages[push.stage]
        shape = (len(stage.experts.layers), stage.experts.slots.num_experts)
        loads = np.frombuffer(push.loads, np.int32)
        if loads.size not in (0, shape[0] * shape[1]):
            what = f"stage {push.stage} pushed {loads.size} loads for {shape[0]} layers of {shape[1]} experts"
            raise Refusal(what, why="they would be counted for others", fix="give stages and `eplb` the same settings")
        if loads.size:
            loads = loads.reshape(shape)
            self.recorder.push(push, loads, stage.experts.num_chosen)
            stage.windows.push(loads, push.num_steps)
        return msgspec.structs.replace(stage.answer(push, now), records=self.recorder.mode == "per_token")

    def dump(self, path: Path) -> None:
        """What was recorded, as a file for `trireme eplb simulate` or for `initial_map`, and beside it what people should know of it.
        Of a record that was stopped nothing is kept here."""
        arrays = self.recorder.dump()
        eplb_file.write(path, self._origin, arrays)
        layers = {f"stage_{number}.layers": stage.experts.layers for number, stage in enumerate(self._stages)}
        shapes = {name: {"shape": array.shape, "dtype": str(array.dtype)} for name, array in arrays.items()}
        notes = {"recording": self.recorder.query(), "columns of rows": COLUMNS, **layers, "arrays": shapes}
        path.with_suffix(".json").write_text(json.dumps(notes, indent=1) + "\n")
        self.recorder.forget()

    def save(self, folder: Path) -> None:
        """Maps, versions and the latest loads, and beside them history for people: loaded when the service starts again."""
        arrays: dict[str, np.ndarray] = {}
        for number, stage in enumerate(self._stages):
            arrays |= {f"stage_{number}.{name}": array for name, array in stage.arrays().items()}
        notes = {"stages": json.dumps([stage.notes() for stage in self._stages])}
        eplb_file.write(folder / "eplb.safetensors", self._origin, arrays, notes)
        unfinished = folder / ".eplb.json"
        unfinished.write_text(json.dumps([list(stage.history) for stage in self._stages], indent=1) + "\n")
        unfinished.replace(folder / "eplb.json")

    def load(self, folder: Path) -> bool:
        """Goes on from what was saved, if anything was. Refusal where it is of another model or plan."""
        if not (folder / "eplb.safetensors").exists():
            return False
        contents = eplb_file.read(folder / "eplb.safetensors")
        contents.check(self._origin)
        for stage, notes in zip(self._stages, json.loads(contents.notes["stages"]), strict=True):
            stage.restore(contents, notes)
        if (folder / "eplb.json").exists():
            for stage, events in zip(self._stages, json.loads((folder / "eplb.json").read_text()), strict=True):
                stage.history.extend(events)
        return True

    def query(self, now: float) -> dict[str, Any]:
        """Everything that there is to see, as plain values for JSON and metrics."""
        eplb = {name: getattr(self._eplb, name) for name in self._eplb.__struct_fields__}
        stages = [stage.query(now) for stage in self._stages]
        return {"settings": eplb, "origin": self._origin._asdict(), "recording": self.recorder.query(), "stages": stages}


class _Judged(NamedTuple):
    """What a look found of a layer, as parts of the busiest rank's time; predicted."""

    gain: float  # that the best map would save
    reading: float  # that reading the weights of its slots takes in any case: of 1, no evenness of rows saves anything


class _Offered(NamedTuple):
    """Maps that a stage was offered and has not said that it has."""

    offer: Offer
    reason: str  # "balance", "self-test" (there and back), "restore"
    at: float
    event: dict[str, Any]


class _Stage:
    """One stage: what it has, what it was offered, what is to come.

    On a push: has the offer been taken, dropped, or forgotten? If none is open, the next one is, in this order, what the stage must
    have back (`_owed`), the self-test, and layers that a look at the loads finds worth moving. A look goes over the layers from
    the worst, a few with each push, by the loads of that time; each layer is judged alone.
    """

    def __init__(self, eplb: Eplb, number: int, experts: StageExperts, initial: np.ndarray, now: float):
        self.experts, self._eplb, self._number = experts, eplb, number
        self.windows = LoadWindows(len(experts.layers), experts.slots.num_experts)
        self.history: deque[dict[str, Any]] = deque(maxlen=_HISTORY)
        self.num_commits = 0
        self._initial, self._maps = initial, initial.copy()
        self._known = np.ones(len(experts.layers), bool)  # False: the stage has a map that this service lost
        self._version = 0
        self._offered: _Offered | None = None
        self._owed: dict[int, np.ndarray] = {}
        self._queue: deque[int] = deque()  # layers that the look has still to judge
        self._judged: dict[int, _Judged] = {}  # by layer, lately
        self._moves: deque[tuple[float, float]] = deque(maxlen=_MOVES)  # bytes that came to the busiest rank, seconds in which steps waited
        self._waited_s = 0.0  # that steps did for the maps that are offered
        self._steps = 0  # since the last look
        self._pause = 0  # steps in which nothing is offered, after a fault
        self._self_test = "waits"
        self._changed_at = now
        self._moved_bytes, self._stalled_s, self._num_faults, self._fault = 0, 0.0, 0, ""

    def answer(self, push: Push, now: float) -> Offer:
        """See Balancer.push."""
        self._steps += push.num_steps
        self._pause = max(0, self._pause - push.num_steps)
        self._moved_bytes += push.moved_bytes
        self._stalled_s += push.stalled_s
        self._waited_s += push.stalled_s
        if self._offered is not None and push.version == self._offered.offer.version:
            self._taken(self._offered, push, now)
        elif push.version != self._version:
            self._began_anew(push, now)
        if push.fault:
            self._failed(push, now)
        if self._offered is not None:
            if now - self._offered.at < _PATIENCE_S:
                return Offer()
            self._offered = self._offered._replace(at=now)  # the same again: a stage that has it pays no heed
            return self._offered.offer
        self._offered = self._next(push, now) if not self._pause else None
        return self._offered.offer if self._offered else Offer()

    def _taken(self, offered: _Offered, push: Push, now: float) -> None:
        """The stage has the maps that it was offered."""
        self._offered, self._version, self._changed_at = None, push.version, now
        self.num_commits += 1
        told = self._known[list(offered.offer.maps)].all() and offered.reason != "self-test"  # two experts are too few to tell
        num_came = 0  # experts to the rank that got the most
        for layer, packed in offered.offer.maps.items():
            before, self._maps[layer] = self._maps[layer].copy(), np.frombuffer(packed, np.int32)
            num_came += int(received(before, self._maps[layer], self.experts.slots).max())
            self._known[layer] = True
            self._judged.pop(layer, None)
            if self._owed.pop(layer, None) is None and offered.reason == "self-test":
                self._owed[layer] = before
        if not self._owed or offered.reason == "balance":
            self._self_test = "passed"
        if told and num_came and self._waited_s and self.experts.on_gpus:
            self._moves.append((num_came * self.experts.expert_bytes, self._waited_s))
        self._waited_s = 0.0
        event = {"at": now, "step": push.number, "version": push.version, "reason": offered.reason}
        self.history.append(event | offered.event | {"moved_bytes": push.moved_bytes, "stalled_s": push.stalled_s})

    def _began_anew(self, push: Push, now: float) -> None:
        """The stage has another version than this service knows of: it started again, with version 0 and the initial maps, and
        shall have back what it had; or it went on while the service was away, and what it has is not known."""
        self._offered, self._version, self._waited_s = None, push.version, 0.0
        self._queue.clear()
        if push.version == 0:
            had = {layer: map_.copy() for layer, map_ in enumerate(self._maps) if self._known[layer]} | self._owed
            # a file of initial maps may have been written again, so that the stage read others than this service
            sure = self._eplb.initial_map == "trivial"
            self._owed = {layer: map_ for layer, map_ in had.items() if not sure or (map_ != self._initial[layer]).any()}
            self._maps, self._known = self._initial.copy(), np.ones(len(self._known), bool)
        else:
            self._owed, self._known = {}, np.zeros(len(self._known), bool)
        self.history.append({"at": now, "step": push.number, "version": push.version, "reason": "began anew"})

    def _failed(self, push: Push, now: float) -> None:
        """The stage dropped the offer; it has what it had. Another one after a while."""
        self._num_faults, self._fault = self._num_faults + 1, push.fault
        self._pause = self._eplb.interval
        self._queue.clear()
        event = {"at": now, "step": push.number, "version": push.version, "reason": "fault", "fault": push.fault}
        if self._offered is not None:
            event["offered"] = self._offered.event["offered"]
            if self._offered.reason == "self-test":
                self._self_test = f"failed: {push.fault}"
        self._offered, self._waited_s = None, 0.0
        self.history.append(event)

    def _next(self, push: Push, now: float) -> _Offered | None:
        """What the stage should be offered now, if anything."""
        if self._owed:
            reason = "restore" if self._self_test == "passed" else "self-test"
            return self._offer(dict(list(self._owed.items())[: self._eplb.layers_per_step]), reason, push, now)
        if self._self_test != "passed" and self._known.all():
            # Two experts change places and go back. Loads may take hours to call for a move, and the way there is to be tried
            # before it is needed; loads of a first push say too little to try it with a real one.
            swapped = {layer: there for layer, map_ in enumerate(self._maps) if (there := exchange(map_, self.experts.slots)) is not None}
            if swapped:
                layer = next(iter(swapped))
                return self._offer({layer: swapped[layer]}, "self-test", push, now)
            self._self_test = "passed"  # every rank has every expert: nothing can move
        if not self._queue and self._steps >= self._eplb.interval and self.windows.num_pushes:
            self._steps = 0
            lost = [self._lost(layer, self.windows.total(self._span)) for layer in range(len(self._maps))]
            self._queue.extend(sorted(range(len(lost)), key=lambda layer: -lost[layer]))
        found = self._look() if self._queue else {}
        return self._offer(found, "balance", push, now) if found else None

    @property
    def _span(self) -> int:
        """Pushes that an interval has, of those numbers that are kept."""
        each = max(1, int(self.windows.num_steps(1).sum()))
        return next((last for last in WINDOWS if last * each >= self._eplb.interval), WINDOWS[-1])

    def _lost(self, layer: int, loads: np.ndarray) -> float:
        """Rows that the busiest rank has beyond its share, of loads [layers, experts]; where the map is not known, all."""
        if not self._known[layer]:
            return float(loads[layer].sum())
        each = rank_loads(self._maps[layer], loads[layer], self.experts.slots)
        return float(each.max() - each.mean())

    def _look(self) -> dict[int, np.ndarray]:
        """The next few layers of the queue that are worth a move, with their maps."""
        found: dict[int, np.ndarray] = {}
        windows, num_steps = self.windows.recent(self._span), self.windows.num_steps(self._span)
        for _ in range(min(len(self._queue), 2 * self._eplb.layers_per_step)):
            layer = self._queue.popleft()
            new = self._judge(layer, windows[:, layer], num_steps)
            if new is not None:
                found[layer] = new
            if len(found) == self._eplb.layers_per_step:
                break
        return found

    @property
    def _bytes_per_s(self) -> float:
        """That come to a rank for the time in which steps wait, as the latest moves made them: experts are on their way beside the steps,
        and that may take its time."""
        came, seconds = map(sum, zip(*self._moves, strict=True)) if self._moves else (0, 0)
        return came / seconds if came else _BYTES_PER_S

    def _judge(self, layer: int, windows: np.ndarray, num_steps: np.ndarray) -> np.ndarray | None:
        """A map that saves enough of a layer's time, or None, by loads [W, experts] of so many steps each [W]. Where min_gain is 0 or
        less every layer moves at every look, if only two slots for each other: a drill, as tests want it."""
        slots, old, row_s, read_s = self.experts.slots, self._maps[layer], self.experts.row_s, self.experts.read_s
        if not self._known[layer]:
            return place(self._eplb.policy, windows, slots)
        new = place(self._eplb.policy, windows, slots, old)
        before, after = (busy_s(map_, windows, num_steps, slots, row_s, read_s) for map_ in (old, new))
        if before > 0:
            reading = busy_s(old, windows, num_steps, slots, 0.0, read_s)
            self._judged[layer] = _Judged(1 - after / before, reading / before)
        if self._eplb.min_gain <= 0:
            return new if (new != old).any() else exchange(old, slots)
        if before <= 0 or 1 - after / before <= self._eplb.min_gain:
            return None
        saved_s = (before - after) * self._eplb.interval / max(1, int(num_steps.sum()))
        cost_s = received(old, new, slots).max() * self.experts.expert_bytes / self._bytes_per_s
        return new if saved_s > cost_s else None

    def _offer(self, maps: dict[int, np.ndarray], reason: str, push: Push, now: float) -> _Offered:
        layers, slots = list(maps), self.experts.slots
        loads = self.windows.total(self._span)[layers]
        event = {
            "offered": push.number,  # experts move from this step on
            "layers": [self.experts.layers[layer] for layer in layers],
            "balance_before": balance(self._maps[layers], loads, slots) if self._known[layers].all() else None,
            "balance_after": balance(np.stack(list(maps.values())), loads, slots),
            "received": sum(int(received(self._maps[layer], map_, slots).sum()) for layer, map_ in maps.items()),
        }
        offer = Offer(self._version + 1, {layer: map_.astype(np.int32).tobytes() for layer, map_ in maps.items()})
        return _Offered(offer, reason, now, event)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is saved, by name."""
        return {"maps": self._maps, "known": self._known, "recent": self.windows.recent(_SAVED_PUSHES)}

    def notes(self) -> dict[str, Any]:
        steps = self.windows.num_steps(_SAVED_PUSHES)
        each = max(1, int(steps.sum()) // max(1, len(steps)))
        totals = {"moved_bytes": self._moved_bytes, "stalled_s": self._stalled_s, "num_faults": self._num_faults}
        return {"version": self._version, "self_test": self._self_test, "num_steps": each, "changed_at": self._changed_at} | totals

    def restore(self, contents: Contents, notes: dict[str, Any]) -> None:
        shape = (len(self.experts.layers), self.experts.slots.num_slots)
        self._maps = _take(contents, self._number, "maps", shape).astype(np.int32)
        self._known = _take(contents, self._number, "known", shape[:1]).astype(bool)
        self._version, self._self_test, self._changed_at = notes["version"], notes["self_test"], notes["changed_at"]
        self._moved_bytes, self._stalled_s, self._num_faults = notes["moved_bytes"], notes["stalled_s"], notes["num_faults"]
        for loads in _take(contents, self._number, "recent", (shape[0], self.experts.slots.num_experts)):
            self.windows.push(loads, notes["num_steps"])

    def query(self, now: float) -> dict[str, Any]:
        slots, names = self.experts.slots, self.experts.layers
        totals = {last: self.windows.total(last) for last in WINDOWS}
        known = self._known.tolist()

        def balances(layers: list[int]) -> dict[str, float | None]:
            whole = layers and all(known[layer] for layer in layers)
            return {str(last): balance(self._maps[layers], total[layers], slots) if whole else None for last, total in totals.items()}

        loads = totals[WINDOWS[-1]]
        layers = [
            {
                "layer": name,
                "map": self._maps[layer].tolist() if known[layer] else None,
                "loads": loads[layer].tolist(),
                "rank_loads": rank_loads(self._maps[layer], loads[layer], slots).tolist() if known[layer] else None,
                "balance": balances([layer]),
                **(self._judged[layer]._asdict() if layer in self._judged else dict.fromkeys(_Judged._fields)),
            }
            for layer, name in enumerate(names)
        ]
        return {
            "stage": self._number,
            "version": self._version,
            "offered": self._offered.offer.version if self._offered else None,
            "num_slots": slots.num_slots,
            "num_experts": slots.num_experts,
            "num_ranks": slots.num_ranks,
            "age_s": now - self._changed_at,
            "num_pushes": self.windows.num_pushes,
            "num_commits": self.num_commits,
            "moved_bytes": self._moved_bytes,
            "stalled_s": self._stalled_s,
            "self_test": self._self_test,
            "num_faults": self._num_faults,
            "last_fault": self._fault,
            "balance": balances(list(range(len(names)))),
            "layers": layers,
            "history": list(self.history),
        }


def exchange(map_: np.ndarray, slots: Slots) -> np.ndarray | None:
    """The map [num_slots] with two experts of two ranks in each other's slot; None where no two can be without meeting a copy."""
    has = held(map_, slots) > 0
    for one in range(slots.num_slots):
        for other in range((one // slots.per_rank + 1) * slots.per_rank, slots.num_slots):
            if not has[one // slots.per_rank, map_[other]] and not has[other // slots.per_rank, map_[one]]:
                swapped = map_.copy()
                swapped[[one, other]] = map_[[other, one]]
                return swapped
    return None


def _take(contents: Contents, stage: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a file whose last dims are these; Refusal where it is missing or of another shape."""
    found = contents.stage(stage, name)
    if found is None or found.shape[-len(shape) :] != shape:
        what = f"{contents.path} has no {name} of stage {stage} for {' x '.join(map(str, shape))}"
        why = "it has none of that stage" if found is None else f"its own are {' x '.join(map(str, found.shape))}"
        raise Refusal(what, why=why, fix="use a file that was made with the same stages, layers and experts")
    return found
