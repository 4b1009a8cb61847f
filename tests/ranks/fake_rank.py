"""A rank without torch that speaks the channel: it echoes tokens, and does worse where a step's first token says so."""

import os
import signal
import sys
import time

import numpy as np

from trireme.core.control import Fault, Found, Founded, Join, Joined, Parcel, Prepare, Prepared, open_message, pack_answer
from trireme.core.step import Outcome, array, ints, peek_step
from trireme.ranks.channel import BREAK, Beat, RankChannel
from trireme.ranks.launch import Brief
from trireme.ranks.worker import Heart, main

FAIL, EXIT, HANG, FREEZE, CARRY = 90001, 90002, 90003, 90004, 90005
SPOILT, STUCK = 13, 14  # layers of which rank 1 prepares no map, and no rank answers


def serve(brief: Brief, channel: RankChannel, heart: Heart) -> None:
    if brief.settings.model == "crash":
        sys.exit(7)
    if brief.settings.model == "refuse":
        heart.tell(Beat("failed", "weights of layer 3 are missing"))
        while True:
            channel.receive()
    heart.tell(Beat("ready", num_pages=11 + brief.rank, num_snapshots=None if brief.stage else 7 - brief.rank))
    broken, version, staged = 0, brief.map_version, 0
    while True:
        ticket, parcel = channel.receive()
        if ticket == BREAK:
            broken += 1
            continue
        message, rows = open_message(parcel.packed), None
        if isinstance(message, Found):
            answer = Founded(message.epoch, f"broken:{broken}")
        elif isinstance(message, Join):
            lost = message.map_version not in (version, staged)
            version, staged = message.map_version, 0
            answer = Fault("rank", "maps are lost") if lost else Joined(message.epoch, version)
        elif isinstance(message, Prepare):
            if STUCK in message.maps:
                continue
            staged, answer = message.version, Prepared(message.epoch, message.version, 100 + brief.rank)
            if SPOILT in message.maps and brief.rank:
                answer = Fault("map", "expert 3 of layer 13 came spoilt", brief.stage, message.epoch)
        else:
            assert isinstance(message, memoryview), "a leader answers the rest itself"
            step = peek_step(bytes(message))
            first = array(step.tokens)[0]
            if first == EXIT and brief.rank == 0:
                time.sleep(0.2)  # it has seen the step, and the others have gone on
            stalled_s = 0.0
            if step.maps and step.maps[brief.stage] == staged > 0:
                version, staged, stalled_s = staged, 0, 0.5
            loads = ints([1 + brief.rank, 2]) if step.counts_loads else b""
            routed = np.array([7, -1] if brief.rank else [-1, 5], np.int16).tobytes() if step.routed else b""
            answer = Outcome(
                step.epoch,
                step.number,
                brief.stage,
                step.tokens,
                routed_experts=routed,
                loads=loads,
                map_ready=version,
                stalled_s=stalled_s,
            )
            if first == FAIL:
                answer = Fault("rank", "the rank could not", brief.stage, step.epoch, step.number)
            elif first == EXIT:
                os._exit(3)
            elif first == HANG:
                time.sleep(1000)
            elif first == FREEZE:
                os.kill(os.getpid(), signal.SIGSTOP)
            elif first == CARRY:
                rows = parcel.rows
        channel.answer(ticket, Parcel(pack_answer(answer), rows), fault=isinstance(answer, Fault))


if __name__ == "__main__":
    main(serve)
