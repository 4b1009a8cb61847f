"""Collectives: one rank's groups inside its stage, by span of the mesh. Built once with the model; each epoch brings its own
communicators and takes them away again. What a communicator does is comm's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from types import MappingProxyType

import torch

from trireme.parallel.aside import Aside
from trireme.parallel.comm import Group, LinkLost
from trireme.parallel.deal import Deal
from trireme.parallel.layout import Move
from trireme.parallel.mail import Mail, Mailbox
from trireme.parallel.mesh import Mesh, Span
from trireme.parallel.peer import Peers, PeerSum


class Along:
    """The ranks along one span, whatever the epoch. Alone, every collective is the identity."""

    def __init__(self, owner: Collectives, span: Span, rank: int):
        self.size, self.place = span.size, span.place(rank)
        self._owner, self._span = owner, span

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x, summed over the ranks; x itself may be overwritten."""
        if self.size == 1:
            return x
        peers = self.peers(x)
        return self._group.all_reduce(x) if peers is None else peers.sum(x)

    def peers(self, x: torch.Tensor) -> Peers | None:
        """Who sums x faster than the group; the same answer on all ranks."""
        peers = self._owner.peers(self._span)
        return peers if peers is not None and peers.takes(x) else None

    def best(self, values: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """values float32 [n], ids int64 [n] from 0 to 2**31 - 1 -> the highest of each row over the ranks and its id, of equals the
        lowest."""
        if self.size == 1 or not len(values):
            return values, ids
        if (peers := self._owner.peers(self._span)) is not None:
            return peers.best(values, ids)
        mine = torch.stack([values.view(torch.int32), ids.to(torch.int32)], dim=1)  # one message
        values, ids = self._group.all_gather(mine, [len(mine)] * self.size).view(self.size, *mine.shape).unbind(2)
        highest = values.view(torch.float32).amax(dim=0)
        return highest, ids.masked_fill(values.view(torch.float32) < highest, torch.iinfo(torch.int32).max).amin(dim=0).long()

    def all_gather(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """[counts[place], ...] -> [sum of counts, ...], in the order of places. What mail carries is soon written over: see Mail."""
        return x if self.size == 1 else self._carrier(x, counts).all_gather(x, counts)

    def reduce_scatter(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """[sum of counts, ...] -> this place's [counts[place], ...], summed in the order of places."""
        return x if self.size == 1 else self._carrier(x, counts).reduce_scatter(x, counts)

    def all_to_all(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """Runs of rows to each place, [sum of sent, ...] -> [sum of received, ...]."""
        return x if self.size == 1 else self._group.all_to_all(x, sent, received)

    @contextmanager
    def held(self) -> Iterator[Group]:
        """The group of this epoch, even once another began: for a thread that no epoch waits for. Left in an error it is closed,
        which frees the others, and what they ask of it before the next epoch is LinkLost."""
        group = self._group
        try:
            yield group
        except Exception:
            self._owner.drop(self._span, group)
            raise

    def _carrier(self, x: torch.Tensor, counts: list[int]) -> Group | Mail:
        """The same on all ranks."""
        mail = self._owner.mail(self._span)
        return mail if mail is not None and mail.takes(x, counts) else self._group

    @property
    def _group(self) -> Group:
        return self._owner.group(self._span)


class Collectives:
    """`along` what the model needs while it is built; `begin` an epoch with a group for each of `spans`; `leave` it. `peer_sum`: the
    op by which few rows are summed in memory that ranks share, where they have any; `mailbox`: such memory for many rows, along tp."""

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        device: torch.device | str = "cpu",
        peer_sum: PeerSum | None = None,
        mailbox: Mailbox | None = None,
    ):
        self.mesh, self.rank = mesh, rank  # inside the stage
        self.device, self.peer_sum, self.mailbox = torch.device(device), peer_sum, mailbox
        self._needed: set[Span] = set()
        self._groups: Mapping[Span, Group] = {}
        self._peers: Mapping[Span, Peers] = {}
        self._mail: Mail | None = None

    @property
    def spans(self) -> list[Span]:
        """Those of more than one rank that were asked for, in one order for all ranks of the stage."""
        return sorted(self._needed)

    @cached_property
    def words(self) -> torch.cuda.Stream:
        """Of a GPU: for words to kernels that wait, one for all epochs. torch has 32 streams of each priority and deals them out in
        turns, those of 0 to NCCL as well, and a word that comes behind a kernel that waits would wait with it."""
        return torch.cuda.Stream(self.device, priority=-1)

    @cached_property
    def aside(self) -> Aside:
        """Of all layers."""
        return Aside(self.device)

    def along(self, span: Span | str, use: str = "") -> Along:
        """The ranks along a span, or along a named axis of the mesh. `use`: see Span."""
        span = (self.mesh.spans[span] if isinstance(span, str) else span)._replace(use=use)
        if span.size > 1:
            self._needed.add(span)
        return Along(self, span, self.rank)

    def begin(self, groups: Mapping[Span, Group], peers: Mapping[Span, Peers] = MappingProxyType({}), mail: Mail | None = None) -> None:
        assert set(groups) == self._needed, "a group for each span"
        self._groups, self._peers, self._mail = groups, peers, mail

    def drop(self, span: Span, group: Group) -> None:
        """Close one group ahead of the others, if it is still the span's."""
        if self._groups.get(span) is group:
            self._groups = {other: each for other, each in self._groups.items() if other != span}
            group.close()

    def give_up(self) -> None:
        """The epoch is over: no kernel need wait any longer for other ranks' memory. What is computed from now on is nothing."""
        for peers in self._peers.values():
            peers.give_up()
        if self._mail is not None:
            self._mail.give_up()

    def leave(self) -> None:
        """Drop the epoch's groups, which frees ranks that wait in them."""
        self.give_up()
        groups, self._groups, shared, self._peers, self._mail = self._groups, {}, [*self._peers.values(), self._mail], {}, None
        for group in groups.values():
            group.close()
        if any(shared) and self.device.type == "cuda":
            with suppress(torch.AcceleratorError):  # of a device that is lost, whose process ends anyway
                torch.cuda.synchronize(self.device)  # nothing uses their memory when it goes; each kernel ends by itself now

    def peers(self, span: Span) -> Peers | None:
        """Nobody else keeps them, so that `leave` drops them."""
        return self._peers.get(span)

    def mail(self, span: Span) -> Mail | None:
        """Likewise."""
        return self._mail if span == self.mesh.spans["tp"] else None

    def group(self, span: Span) -> Group:
        """Nobody else keeps it, so that `leave` drops it. LinkLost between epochs."""
        try:
            return self._groups[span]
        except KeyError:
            raise LinkLost(f"no communicator along {self.mesh.name_of(span)}: the epoch is over") from None


def carry_out(move: Move, along: Along | None, x: torch.Tensor, deal: Deal) -> torch.Tensor:
    """One move of a layout, with the step's rows in the order that the deal gives them. A slice needs nobody along."""
    if along is None:
        return picked(x, deal.path(move).keep)
    if move.collective == "all_reduce":
        return along.all_reduce(x)
    path = deal.path(move)
    if move.collective == "all_gather":
        return picked(along.all_gather(x, path.counts), path.keep)
    return along.reduce_scatter(picked(x, path.send), path.counts)


def picked(x: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
    """[N, ...] -> its `rows`, int64 [n]; neighbours are not copied."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
