"""A rank without torch that speaks the channel: it echoes tokens, and does worse where a step's first token says so."""

import os
import signal
import sys
import time

from trireme.core.control import Fault, Found, Founded, Join, Joined, Parcel, open_message, pack_answer
from trireme.core.step import Outcome, array, peek_step
from trireme.ranks.channel import BREAK, Beat, RankChannel
from trireme.ranks.launch import Brief
from trireme.ranks.worker import Heart, main

FAIL, EXIT, HANG, FREEZE, CARRY = 90001, 90002, 90003, 90004, 90005


def serve(brief: Brief, channel: RankChannel, heart: Heart) -> None:
    if brief.settings.model == "crash":
        sys.exit(7)
    if brief.settings.model == "refuse":
        heart.tell(Beat("failed", "weights of layer 3 are missing"))
        while True:
            channel.receive()
    heart.tell(Beat("ready", num_pages=11 + brief.rank, num_snapshots=None if brief.stage else 7 - brief.rank))
    broken = 0
    while True:
        ticket, parcel = channel.receive()
        if ticket == BREAK:
            broken += 1
            continue
        message, rows = open_message(parcel.packed), None
        if isinstance(message, Found):
            answer = Founded(message.epoch, f"broken:{broken}")
        elif isinstance(message, Join):
            answer = Joined(message.epoch)
        else:
            step = peek_step(bytes(message))
            first = array(step.tokens)[0]
            answer = Outcome(step.epoch, step.number, brief.stage, tokens=step.tokens)
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
