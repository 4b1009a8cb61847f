"""Link: how hidden rows go from stage to stage, and sampled tokens back to stage 0. Three forms; a runner sees one.

collective   rank to rank (gloo, NCCL):   stage 0 --edge_0--> stage 1 --edge_1--> stage 2 --return--> stage 0
tensor       in the Parcel of the call and of its answer: plain BLS chaining, no tokens back
solo         one stage: no rows; tokens go from its end to its beginning

Each rank of a stage has a link of its own, to its twins: those of the same number in the other stages. On a collective link it
hands on the rows that it has, so that under sequence parallelism a twin gets 1 / tp of them, and nothing is gathered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from trireme.core.devices import steps_in_flight
from trireme.core.log import logger
from trireme.core.settings import Settings
from trireme.parallel.collectives import Collectives
from trireme.parallel.comm import Group, LinkLost, Pair, exchange, form_group, make_unless, meet, reach_store, wait_for_device
from trireme.parallel.mail import Mail
from trireme.parallel.mesh import Span
from trireme.parallel.peer import Peers, find_most, meet_peers


class ExpectedTokens(Protocol):
    """Sampled tokens on their way back to stage 0."""

    def wait(self) -> torch.Tensor:  # int32 [num_samples]
        ...


class Link(Protocol):
    """One rank's ends for one epoch. LinkLost where another stage is gone, late or wrong."""

    @property
    def name(self) -> str:
        """Of its edges, for people."""
        ...

    def receive(self, num_rows: int, carried: np.ndarray | None) -> torch.Tensor | None:
        """Rows of the stage before, [num_rows, hidden]; None in stage 0. `carried` came with the call."""
        ...

    def send(self, rows: torch.Tensor) -> np.ndarray | None:
        """Rows for the stage after; what is returned goes with the answer."""
        ...

    def expect_tokens(self, num_samples: int) -> ExpectedTokens:
        """Stage 0: the tokens of a step that returns them, in step order."""
        ...

    def send_tokens(self, tokens: torch.Tensor) -> None:
        """Last stage: int32 [num_samples], in step order."""
        ...

    def close(self) -> None:
        """The epoch's end: ranks at the other ends are freed."""
        ...


def form_link(
    settings: Settings,
    collectives: Collectives,
    stage: int,
    epoch: int,
    store: str,
    *,
    hidden: int,
    dtype: torch.dtype,
    give_up: Callable[[], bool],
) -> Link:
    """This rank's link of an epoch, and the groups of its collectives. Blocks until every rank of every stage has joined;
    LinkLost where they do not, or `give_up` says so."""
    num_stages, num_ranks, rank, limit_s = settings.num_stages, settings.ranks_per_stage, collectives.rank, settings.step_timeout_s
    if not settings.meets:
        return SoloLink() if num_stages == 1 else TensorLink(stage, rank, hidden=hidden, dtype=dtype)
    meeting = make_unless(give_up, lambda _: reach_store(store, limit_s))
    meet(meeting, epoch, stage * num_ranks + rank, settings.world, limit_s, give_up)

    def join_peers(span: Span, name: str, group: Group, given_up: Callable[[], bool]) -> Peers | None:
        op, place, device = collectives.peer_sum, span.place(rank), collectives.device
        if op is None or span.use:
            return None

        def tell(about: str, said: bytes) -> list[bytes]:
            return exchange(meeting, epoch, f"{name}.{about}", place, span.size, said)

        peers = meet_peers(place, span.size, device, hidden=hidden, dtype=dtype, op=op, words=collectives.words, exchange=tell)
        log = logger(f"stage_{stage} rank {rank}")
        if isinstance(peers, str):
            log.info("sums of %s by NCCL alone: %s", name, peers)
            return None
        log.info("sums of %s: %s", name, find_most(peers, group, device, tell, limit_s, given_up))
        return peers if peers.most else None

    def join_mail(span: Span, name: str, group: Group, given_up: Callable[[], bool]) -> Mail | None:
        op, mailbox, device = collectives.peer_sum, collectives.mailbox, collectives.device
        if op is None or mailbox is None or span != collectives.mesh.spans["tp"]:
            return None

        def tell(about: str, said: bytes) -> list[bytes]:
            return exchange(meeting, epoch, f"{name}.{about}", mailbox.place, span.size, said)

        mail = mailbox.meet(op, collectives.words, tell)
        told = f"not by mail: {mail}" if isinstance(mail, str) else "by mail"
        logger(f"stage_{stage} rank {rank}").info("rows of large steps along %s: %s", name, told)
        if isinstance(mail, str):
            return None
        try:
            with torch.cuda.device(device):  # a thread has a device of its own
                mail.greet(lambda: wait_for_device(device, limit_s, given_up))
        except LinkLost:
            group.close()
            raise
        return mail

    def form(given_up: Callable[[], bool]) -> tuple[dict[Span, Group], dict[Span, Peers], Mail | None, Link]:
        """Every rank forms its groups in this order, and then its pairs, so none waits in a circle."""

        def pair(name: str, side: int) -> Pair:
            return Pair(meeting, epoch, f"{name}.{rank}", side, limit_s, steps_in_flight(settings), collectives.device, given_up)

        groups: dict[Span, Group] = {}
        peers: dict[Span, Peers] = {}
        mail: Mail | None = None
        for span in collectives.spans:
            name = f"stage_{stage}.{collectives.mesh.group_of(span, rank).name}"
            device = torch.device("cpu") if span.use else collectives.device  # beside the steps a GPU waits for no other
            groups[span] = form_group(meeting, epoch, name, span.place(rank), span.size, limit_s, device, given_up)
            if (joined := join_peers(span, name, groups[span], given_up)) is not None:
                peers[span] = joined
            mail = mail or join_mail(span, name, groups[span], given_up)
        if num_stages == 1:
            return groups, peers, mail, SoloLink()
        if settings.link == "tensor":
            return groups, peers, mail, TensorLink(stage, rank, hidden=hidden, dtype=dtype)
        before = pair(f"edge_{stage - 1}", 1) if stage > 0 else None
        after = pair(f"edge_{stage}", 0) if stage < num_stages - 1 else None
        back = pair("return", 0 if stage else 1) if stage in (0, num_stages - 1) else None
        return groups, peers, mail, CollectiveLink(before, after, back, hidden=hidden, dtype=dtype)

    groups, peers, mail, link = make_unless(give_up, form)
    collectives.begin(groups, peers, mail)
    return link


class CollectiveLink:
    def __init__(self, before: Pair | None, after: Pair | None, back: Pair | None, *, hidden: int, dtype: torch.dtype):
        self._before, self._after, self._back = before, after, back
        self._hidden, self._dtype = hidden, dtype

    @property
    def name(self) -> str:
        return ", ".join(pair.name for pair in (self._before, self._after, self._back) if pair is not None)

    def receive(self, num_rows: int, carried: np.ndarray | None) -> torch.Tensor | None:
        return self._before.expect(num_rows, self._hidden, dtype=self._dtype).wait() if self._before else None

    def send(self, rows: torch.Tensor) -> np.ndarray | None:
        assert self._after, "the last stage sends no rows"
        self._after.send(rows)

    def expect_tokens(self, num_samples: int) -> ExpectedTokens:
        assert self._back, "tokens come back to stage 0"
        return self._back.expect(num_samples, dtype=torch.int32)

    def send_tokens(self, tokens: torch.Tensor) -> None:
        assert self._back, "tokens are sampled in the last stage"
        self._back.send(tokens)

    def close(self) -> None:
        for pair in (self._before, self._after, self._back):
            if pair is not None:
                pair.close()


class TensorLink:
    """Every rank gets the rows with the call, and rank 0 gives them with its answer: an edge has all of them."""

    name = "the tensor link"

    def __init__(self, stage: int, rank: int, *, hidden: int, dtype: torch.dtype):
        self._stage, self._rank, self._hidden, self._dtype = stage, rank, hidden, dtype

    def receive(self, num_rows: int, carried: np.ndarray | None) -> torch.Tensor | None:
        if self._stage == 0:
            return None
        rows = torch.empty(num_rows, self._hidden, dtype=self._dtype)
        raw = rows.view(torch.uint8).view(-1).numpy()
        if carried is None or carried.size != raw.size:
            found = "none" if carried is None else f"{carried.size} bytes"
            raise LinkLost(f"stage_{self._stage} needs {raw.size} bytes of rows with the call, and {found} came")
        raw[:] = carried
        return rows

    def send(self, rows: torch.Tensor) -> np.ndarray | None:
        if self._rank:
            return None
        return rows.contiguous().view(torch.uint8).view(-1).numpy()

    def expect_tokens(self, num_samples: int) -> ExpectedTokens:
        raise LinkLost("the tensor link brings no tokens back: the front waits for them")

    def send_tokens(self, tokens: torch.Tensor) -> None:
        raise LinkLost("the tensor link brings no tokens back: the front waits for them")

    def close(self) -> None:
        """It has no other ends."""


class SoloLink:
    name = "the link of one stage"

    def __init__(self) -> None:
        self._expected: deque[_Here] = deque()

    def receive(self, num_rows: int, carried: np.ndarray | None) -> torch.Tensor | None:
        return None

    def send(self, rows: torch.Tensor) -> np.ndarray | None:
        raise AssertionError("the only stage sends no rows")

    def expect_tokens(self, num_samples: int) -> ExpectedTokens:
        self._expected.append(_Here())
        return self._expected[-1]

    def send_tokens(self, tokens: torch.Tensor) -> None:
        self._expected.popleft().tokens = tokens

    def close(self) -> None:
        self._expected.clear()


class _Here:
    """Tokens that need no way."""

    tokens: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.tokens
