"""Mail: rows that ranks put into each other's memory are those that a group brings, whatever the order of ranks and calls; and on
GPUs, in strips beside products."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest
import torch

from spawned import LIMIT_S, on_gpus
from threads import on_every_rank
from trireme.core.step import Regime
from trireme.parallel.collectives import Collectives
from trireme.parallel.comm import LinkLost, exchange, form_group
from trireme.parallel.deal import Deal
from trireme.parallel.layout import SUM, home_of, lay
from trireme.parallel.mail import Mail, Mailbox
from trireme.parallel.mesh import Mesh
from trireme.parallel.peer import Boxes
from trireme.parallel.plan import Plan
from trireme.parallel.seam import Seam
from trireme_kernels.choose import Choices
from trireme_kernels.peer_sum.reference import Reference

HIDDEN, ROWS = 6, 300


class Bell:
    """As Peers, of CPUs."""

    def __init__(self, boxes: Boxes):
        self._boxes = boxes

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return Reference().sum(x, self._boxes)

    def give_up(self) -> None:
        self._boxes.given_up.fill_(1)


def mails(size: int, num_slots: int = 2) -> list[Mail]:
    """Of ranks in threads."""
    mailboxes = [Mailbox(place, size, ROWS, HIDDEN, torch.float32, "cpu", num_slots=num_slots) for place in range(size)]
    every = [torch.full((2, size, 1, 16), torch.iinfo(torch.int32).min, dtype=torch.int32) for _ in range(size)]
    found = []
    for place, mailbox in enumerate(mailboxes):
        zeros = torch.zeros(1, dtype=torch.int32)
        boxes = Boxes(place, every, zeros, zeros.clone(), zeros.clone())
        others = {other: each.memory for other, each in enumerate(mailboxes) if other != place}
        found.append(Mail(mailbox, others, Bell(boxes)))
    return found


def counts_of(num_rows: int, size: int) -> list[int]:
    share = -(-num_rows // size)
    return [min(share, max(0, num_rows - place * share)) for place in range(size)]


@pytest.mark.parametrize("num_slots", [1, 2])
@pytest.mark.parametrize("size", [2, 3])
def test_calls_in_any_order_bring_what_a_group_brings(size: int, num_slots: int):
    """Ranks come early and late; with two slots, of two gatherings in a row both are read after the second."""
    calls = random.Random(size).choices(["sum", "gather", "two"][: 1 + num_slots], k=60)
    numbers = [[torch.randn(ROWS - call % 7, HIDDEN) for call in range(len(calls))] for _ in range(size)]
    every = mails(size, num_slots)

    def run(place: int) -> None:
        try:
            calls_of(place)
        except BaseException:
            for mail in every:  # whoever waits
                mail.give_up()
            raise

    def calls_of(place: int) -> None:
        mail, late = every[place], random.Random(place)
        mail.greet(lambda: None)
        for call, kind in enumerate(calls):
            time.sleep(late.random() * 0.003)
            brought = [rank[call] for rank in numbers]
            counts = counts_of(len(brought[0]), size)
            assert mail.takes(brought[0], counts)
            if kind == "sum":
                found = mail.reduce_scatter(brought[place], counts)
                torch.testing.assert_close(found, torch.stack(brought).sum(0).split(counts)[place])
                continue
            parts = [rows.split(counts)[at] for at, rows in enumerate(brought)]
            gathered = [mail.all_gather(sign * parts[place], counts) for sign in (1, -1)[: 1 + (kind == "two")]]
            for sign, rows in zip((1, -1), gathered, strict=False):
                assert torch.equal(rows, sign * torch.cat(parts))

    on_every_rank(size, run)


def test_a_greeting_that_nobody_answers_leaves_no_kernel_waiting():
    heard = []

    class Silent:
        def sum(self, x: torch.Tensor) -> torch.Tensor:
            heard.append("sum")
            return x

        def give_up(self) -> None:
            heard.append("give up")

    def wait() -> None:
        raise LinkLost("not all ranks came within 1 s")

    with pytest.raises(LinkLost):
        Mail(Mailbox(0, 2, ROWS, HIDDEN, torch.float32, "cpu"), bell=Silent()).greet(wait)
    assert heard == ["sum", "give up"]


def test_what_does_not_fit_goes_another_way():
    [mail, _] = mails(2)
    x = torch.zeros(ROWS, HIDDEN)
    assert mail.takes(x, [150, 150]) and mail.takes(x[:256], [128, 128])
    assert not mail.takes(x, [151, 149]) and not mail.takes(x[:255], [128, 127])
    assert not mail.takes(x[:, :4], [150, 150]) and not mail.takes(x.half(), [150, 150])


def test_without_others_shapes_are_right():
    mail = Mail(Mailbox(1, 4, ROWS, HIDDEN, torch.float32, "cpu"))
    assert mail.reduce_scatter(torch.zeros(ROWS, HIDDEN), [75] * 4).shape == (75, HIDDEN)
    assert mail.all_gather(torch.zeros(75, HIDDEN), [75] * 4).shape == (ROWS, HIDDEN)


def crossed(place: int, store: Any, epoch: int, device: torch.device) -> list[float]:
    """How far the rows of 40 layers are, by mail and then in strips too, from those of one strip by NCCL, whose products round
    otherwise; of even and odd steps."""
    dtype, hidden, found = torch.bfloat16, 2048, []
    choices, plans = Choices("cuda", dtype), [Plan(layer_cut=(1,), tp=2, sp=True, strip_rows=rows) for rows in (0, 4096, 2048)]
    weights = [torch.randn(hidden, hidden, device=device, generator=torch.Generator(device).manual_seed(place)).to(dtype) * hidden**-0.5]
    seams, regime = [], Regime(sp=True)
    for plan in plans:
        num_slots = 4096 // plan.strip_rows if plan.strip_rows else 0
        mailbox = Mailbox(place, 2, plan.strip_rows, hidden, dtype, device, num_slots=num_slots) if num_slots else None
        collectives = Collectives(Mesh(plan), place, device, choices("peer_sum", hidden=hidden), mailbox)
        home = home_of(regime)
        norms = {"rms_norm": choices("rms_norm", hidden=hidden), "add_rms_norm": choices("add_rms_norm", hidden=hidden)}
        ones = torch.ones(hidden, device=device, dtype=dtype)
        seams.append(Seam(lay(tp=SUM).at(home), home, lay().at(home), collectives, weight=ones, eps=1e-6, **norms))
        name, mail = f"seam {plan.strip_rows}", None
        if mailbox is not None:
            mail = mailbox.meet(
                choices("peer_sum", hidden=hidden),
                collectives.words,
                lambda about, said, name=name: exchange(store, epoch, f"{name}.{about}", place, 2, said),
            )
            assert isinstance(mail, Mail), mail
        collectives.begin({span: form_group(store, epoch, name, place, 2, LIMIT_S, device) for span in collectives.spans}, mail=mail)
    for num_rows in (4096, 4001, 3000, 700):
        draw = torch.Generator(device).manual_seed(num_rows)
        start = torch.randn(num_rows, hidden, device=device, generator=draw).to(dtype)
        results = []
        for plan, seam in zip(plans, seams, strict=True):
            deal = Deal(plan, place, np.array([num_rows]), regime, device)
            assert len(deal.strips) == (2 if 0 < plan.strip_rows < num_rows else 1)
            cut = (Mesh(plan).spans["tp"],)
            normed, residual = None, start[torch.from_numpy(deal.rows(cut)).to(device)].split(deal.sizes(cut))
            x = start.split(deal.sizes(()))
            for _ in range(40):
                normed, residual = seam(x, residual, deal)
                x = (rows @ weights[0] for rows in normed)
            results.append(torch.cat([*x]).float())
        found += [((results[0] - each).norm() / results[0].norm()).item() for each in results[1:]]
    return found


@pytest.mark.gpus
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_strips_by_mail_are_what_one_strip_is_by_nccl():
    found = on_gpus(2, crossed, 7)
    print(found)
    assert all(far < 0.05 for each in found.values() for far in each)
