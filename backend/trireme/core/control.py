"""Control: what the front asks of a stage besides steps, and a stage's answers. One message in, one answer out, in a Parcel."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np

from trireme.core.step import Outcome


class Parcel(NamedTuple):
    """What one BLS call carries each way: a packed message and, on the tensor link, rows."""

    packed: bytes
    rows: np.ndarray | None = None  # uint8 [bytes]: [T, hidden] rows of the model's dtype


class Status(msgspec.Struct, frozen=True, tag="status"):
    """How is the stage? Answered at once with StageState."""


class Found(msgspec.Struct, frozen=True, tag="found"):
    """To stage 0: host a rendezvous store for this epoch. Answered with Founded."""

    epoch: int


class Join(msgspec.Struct, frozen=True, tag="join"):
    """To every stage: drop the old epoch (pages, slots, groups), form this one's groups. Answered with Joined."""

    epoch: int
    store: str = ""  # host:port of the rendezvous store; empty where no group is needed
    map_version: int = 0  # by a leader to its ranks: of the expert maps that the stage has; a rank that is one behind has it laid ready


class RankState(msgspec.Struct, frozen=True):
    """One rank as its leader sees it."""

    rank: int
    state: str  # "starting" | "loading" | "ready" | "dead" | "failed"
    pid: int = 0
    detail: str = ""


class StageState(msgspec.Struct, frozen=True, tag="state"):
    """A stage as its leader sees it; `detail` is a sentence for a user while state is not ready."""

    stage: int
    state: str  # "starting" | "loading" | "ready" | "healing" | "failed"
    detail: str = ""
    epoch: int = -1  # the last epoch joined
    num_pages: int = 0  # capacity, once ready
    num_snapshots: int | None = None  # room for copies of a sequence's states; None where no layer keeps any
    activation_bytes: int = 0  # of a rank at the most, at the peak of the largest step, and its mailbox; 0 on CPUs: not measured
    ranks: list[RankState] = []
    reordered: int = 0  # steps that came early and were held, since the stage began
    restarts: int = 0  # ranks started again
    map_version: int = 0  # of the expert maps in force


class Founded(msgspec.Struct, frozen=True, tag="founded"):
    epoch: int
    store: str


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    epoch: int
    map_version: int = 0  # of the expert maps with which the stage begins the epoch: in force when the last one ended
    sp_from: int | None = None  # rows of a step from which sequence parallelism pays in this stage; None: not measured


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """A step or control message that was not carried out. `kind`: "stale", "duplicate", "gap", "checksum", "link",
    "rank" (died or failed), "unready", "map". Nothing computes on in that epoch, unless it answers a Prepare."""

    kind: str
    message: str
    stage: int = -1
    epoch: int = -1
    number: int = -1


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """A leader to its ranks: fetch the experts of new maps, version `version`, and lay them ready. Answered with Prepared, or with a
    Fault of kind "map", after which the epoch goes on with the maps there are."""

    epoch: int
    version: int
    maps: dict[int, bytes]  # by the number of the layer among those with experts: int32 [num_slots], the expert in each slot


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    epoch: int
    version: int
    moved_bytes: int = 0  # that came from other ranks


class Push(msgspec.Struct, frozen=True, tag="push"):
    """A stage to the model `eplb`: what its experts were given since the last push, under which maps. Answered with an Offer."""

    stage: int
    number: int  # of the last step that is in it
    version: int  # of the maps that the stage has
    loads: bytes  # int32 [layers with experts, num_experts]
    num_steps: int = 1
    moved_bytes: int = 0
    stalled_s: float = 0.0  # that commits took
    fault: str = ""  # why the last offer was not taken, or empty
    rows: bytes = b""  # int32 [n, columns of ToldRows], where the service records the experts of every row
    experts: bytes = b""  # int16 [n, layers with experts, experts of a row]
    left_out: int = 0  # rows that were too many to be told


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    """New maps for a stage, or none where it is well as it is; and what the service wants to be told."""

    version: int = 0
    maps: dict[int, bytes] = {}  # as in Prepare
    records: bool = False  # whether the experts of every row shall be told


Ask = Status | Found | Join | Prepare  # the last is for ranks only
Answer = StageState | Founded | Joined | Prepared | Outcome | Fault

_STEP, _ASK = b"S", b"A"
_encoder = msgspec.msgpack.Encoder()
_ask_decoder = msgspec.msgpack.Decoder(Ask)
_push_decoder = msgspec.msgpack.Decoder(Push | Status)
_offer_decoder = msgspec.msgpack.Decoder(Offer)


class _Sealed(msgspec.Struct, frozen=True):
    """Answers travel wrapped: Outcome is array-like and the others are maps, which msgspec does not mix in one union."""

    outcome: Outcome | None = None
    other: StageState | Founded | Joined | Prepared | Fault | None = None


_answer_decoder = msgspec.msgpack.Decoder(_Sealed)


def pack_ask(ask: Ask) -> bytes:
    return _ASK + _encoder.encode(ask)


def seal_step(packed_step: bytes) -> bytes:
    """A step (see core.step.pack_step) as a message to a stage."""
    return _STEP + packed_step


def open_message(packed: bytes) -> Ask | memoryview:
    """An Ask, or the packed step inside."""
    if packed[:1] == _STEP:
        return memoryview(packed)[1:]
    return _ask_decoder.decode(memoryview(packed)[1:])


def pack_answer(answer: Answer) -> bytes:
    sealed = _Sealed(outcome=answer) if isinstance(answer, Outcome) else _Sealed(other=answer)
    return _encoder.encode(sealed)


def open_answer(packed: bytes) -> Answer:
    sealed = _answer_decoder.decode(packed)
    answer = sealed.outcome if sealed.outcome is not None else sealed.other
    assert answer is not None, "an answer holds an outcome or another message"
    return answer


def pack_push(push: Push | Status) -> bytes:
    """A message to `eplb`. Status asks whether it is there, and is answered with an Offer of nothing."""
    return _encoder.encode(push)


def open_push(packed: bytes) -> Push | Status:
    return _push_decoder.decode(packed)


def pack_offer(offer: Offer) -> bytes:
    return _encoder.encode(offer)


def open_offer(packed: bytes) -> Offer:
    return _offer_decoder.decode(packed)
