"""Step and Outcome: what the front tells every stage to compute, and what a stage answers. Bytes by msgspec, never pickle.

A Step says only what changes. Ranks keep a page table and a sampler row for each slot; a Step opens slots, writes page
table entries and lists rows. Checksums are chained: step k's covers its own bytes and the checksum of step k-1, so a
stage that missed or altered anything refuses the next step by name instead of computing on.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import msgspec
import numpy as np

from trireme.core.refusal import Refusal
from trireme.core.request import Logprobs, Sampling

FED = -1  # in Step.tokens: the token that this slot sampled last, known to the ranks before it is known to the front
PAGE = 16  # tokens in a page


def ints(values) -> bytes:
    """Int32 values as the bytes that Steps and Outcomes carry."""
    return np.asarray(values, dtype=np.int32).tobytes()


def array(packed: bytes) -> np.ndarray:
    """The int32 values of a packed field (read-only view)."""
    return np.frombuffer(packed, dtype=np.int32)


def accepted(drafts: np.ndarray, tokens: np.ndarray) -> int:
    """How many of a sequence's drafts stand: int [d] drafts, int [d + 1] tokens sampled at the rows before and of them.

    Each token is drawn from the model's own distribution given the rows before it, so the first that differs from its draft is
    as good as any, and those after it were drawn for a text that is not: accepted([5, 6, 7], [5, 6, 9, 1]) == 2, and 5 6 9 are
    the sequence's. Drafts are certain (an argmax), so this is Leviathan et al. 2023's rejection rule with one draw for both.
    """
    return int(np.cumprod(drafts == tokens[: len(drafts)]).sum())


class Regime(NamedTuple):
    """How the ranks of a stage share the rows of one step, where that differs from step to step."""

    sp: bool = False  # the residual is cut by rows over tp
    cp: bool = False  # prompt rows are cut zig-zag over cp; else every cp rank computes all rows

    def __str__(self) -> str:
        return " ".join(name for name, on in zip(self._fields, self, strict=True) if on) or "plain"

    @classmethod
    def of(cls, counts: list[int], sp_from: int | None, cp: int) -> Regime:
        """Of a step whose items have `counts` rows, as the front writes it; cp is 1 in a step of decodes. An item shorter than
        2 * cp (the end of a prompt) cannot be cut zig-zag evenly, so cp is on where the longer ones hold half of the rows."""
        num_rows = sum(counts)
        return cls(
            sp=sp_from is not None and num_rows >= sp_from,
            cp=cp > 1 and 2 * sum(count for count in counts if count >= 2 * cp) >= num_rows,
        )


class Open(msgspec.Struct, frozen=True, array_like=True):
    """A sequence takes a slot: its sampler row starts anew. `history` is its token log so far (prompt, then output)
    where the sampler needs it (penalties, prompt logprobs), else empty."""

    slot: int
    sampling: Sampling
    prompt_len: int  # tokens of the prompt; a preempted sequence's log is longer
    history: bytes = b""


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """One forward of one batch through all stages. Item i computes positions starts[i] .. starts[i]+counts[i]-1 of slots[i]."""

    epoch: int
    number: int  # rises by one from 0 in an epoch
    slots: bytes  # int32 [items]
    starts: bytes  # int32 [items]
    counts: bytes  # int32 [items]
    samples: bytes  # int32 [items]: how many of the item's last rows are sampled: 0, 1, or where it has drafts all of them
    tokens: bytes  # int32 [sum of counts]; FED: where counts is 1, and all rows of an unsettled item
    opens: list[Open] = []
    page_writes: bytes = b""  # int32 [writes, 3]: slot, index in its page table, page
    bans: list[tuple[int, list[int]]] = []  # (item, token ids) that must not be sampled now; the place for grammars too
    returns: bool = False  # whether the last stage sends sampled tokens back to stage 0 (they will be FED), and drafts behind them
    sp: bool = False
    cp: bool = False
    replays: bytes = b""  # int32 [items]: how many of the rows that the slot holds were accepted; its states take them first
    holds: bytes = b""  # int32 [items]: 1 where rows are a token and drafts, which states take only when they are replayed
    restores: bytes = b""  # int32 [n, 2]: (snapshot, slot): the slot's states begin as the snapshot, before this step's rows
    saves: bytes = b""  # int32 [n, 2]: (slot, snapshot): the slot's states are kept there, after this step's rows
    nexts: bytes = b""  # int32 [items]: the token after an item's last row, -1 where that row is sampled
    drafts: int = 0  # tokens that the last stage drafts for each item that samples
    counts_loads: bool = False  # whether ranks report the loads of their experts with this step
    routed: bytes = b""  # int32: items of which the experts of every row are told
    maps: list[int] = []  # version of each stage's expert maps from this step on; empty: none was ever changed
    records: bool = False  # whether stages tell the service that balances experts of those of every row
    # int32: items planned before it was known which drafts of their slot's last item stand. They begin and replay (starts, replays) as if
    # none did; with those that do, and the drafts made since, the ranks settle them (ranks/settle)
    unsettled: bytes = b""

    @property
    def regime(self) -> Regime:
        return Regime(self.sp, self.cp)

    @property
    def num_rows(self) -> int:
        return len(self.tokens) // 4

    @property
    def num_items(self) -> int:
        return len(self.slots) // 4

    @property
    def num_samples(self) -> int:
        return int(array(self.samples).sum())

    @property
    def num_drafts(self) -> int:
        """Tokens that the last stage drafts for all items."""
        return self.drafts * int(np.count_nonzero(array(self.samples)))

    @property
    def settles(self) -> bool:
        """Whether an item of a later step may be unsettled until this one has told what it samples and drafts."""
        return self.returns and (self.drafts > 0 or self.num_samples > int(np.count_nonzero(array(self.samples))))

    @property
    def num_told(self) -> int:
        """Tokens that come back to stage 0: those sampled, and behind them where it `settles` those drafted."""
        return self.num_samples + self.num_drafts

    @property
    def num_routed(self) -> int:
        """Rows of which the experts are told."""
        return int(array(self.counts)[array(self.routed)].sum())


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs of prompt tokens start+1 .. start+len(values) of the sequence in `slot`."""

    slot: int
    start: int
    values: list[Logprobs]


class Clock(msgspec.Struct, frozen=True, array_like=True):
    """Where a rank's time went for one step, in seconds; `began` is time.time() at the start of the forward."""

    began: float = 0.0
    waiting: float = 0.0  # for a step to come
    receiving: float = 0.0  # for rows or fed-back tokens of other stages
    busy: float = 0.0  # computing and sending


class Outcome(msgspec.Struct, frozen=True, array_like=True, tag="outcome"):
    """A stage's answer to one Step. Only the last stage fills tokens: one for each sampled row, in row order. After a token that
    differs from the draft in the next row nothing counts: see `accepted`."""

    epoch: int
    number: int
    stage: int
    tokens: bytes = b""  # int32 [num_samples], one for each sampled row
    logprobs: list[Logprobs | None] = []  # [num_samples] where any item asked, else empty
    prompt_logprobs: list[PromptLogprobs] = []
    clock: Clock = Clock()
    drafts: bytes = b""  # int32 [items that sample, Step.drafts]
    # int16 [Step.num_routed, layers with experts, experts of a row]: which experts each row was given, heaviest first. Of one rank
    # -1 where another has routed the row, or nothing
    routed_experts: bytes = b""
    loads: bytes = b""  # int32 [layers with experts, num_experts]: rows that each was given since the last report
    map_ready: int = 0  # version of the stage's expert maps that all its ranks have prepared, or have
    stalled_s: float = 0.0  # that this step waited for new maps to be put in force
    # int16 [Step.num_rows, layers with experts, experts of a row] of Step.records, as in routed_experts; goes no further than the leader
    recorded: bytes = b""
    records: bool = False  # whether the stage's service wants steps that record


_encoder = msgspec.msgpack.Encoder()
_step_decoder = msgspec.msgpack.Decoder(Step)
_SEAL = struct.Struct("<I")


def first_checksum(epoch: int) -> int:
    """What step 0 of an epoch chains to."""
    return zlib.crc32(struct.pack("<q", epoch))


def pack_step(step: Step, previous: int) -> tuple[bytes, int]:
    """(bytes, checksum) of a step that follows one with checksum `previous`."""
    body = _encoder.encode(step)
    checksum = zlib.crc32(body, previous)
    return _SEAL.pack(checksum) + body, checksum


def peek_step(packed: bytes) -> Step:
    """The step inside, unverified: for a leader that must hold an early one."""
    return _step_decoder.decode(memoryview(packed)[_SEAL.size :])


def verify_step(packed: bytes, previous: int) -> int:
    """The step's checksum; Refusal where it does not follow a step with checksum `previous`."""
    (claimed,) = _SEAL.unpack_from(packed)
    found = zlib.crc32(memoryview(packed)[_SEAL.size :], previous)
    if claimed != found:
        raise Refusal(
            "step refused: its checksum is not that of the steps before it",
            why=f"claimed {claimed:08x}, computed {found:08x}",
            fix="the front opens a new epoch",
            kind="internal",
        )
    return found
