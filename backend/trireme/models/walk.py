"""Walk: the way of a step's rows through the blocks of a stage, with a seam before each. What the blocks are is decoder's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from trireme.core.step import Regime
from trireme.layers.block import Block, Build
from trireme.layers.embed import Embed
from trireme.parallel.collectives import picked
from trireme.parallel.deal import Deal, Heads
from trireme.parallel.layout import WHOLE, Layout, cut_of, home_of, lay
from trireme.parallel.seam import Addend, Route, Seam
from trireme.parallel.strips import Strips, joined


class Walk:
    """A stage's way through its blocks in one regime: a route in, a seam before each block, and what is owed at the end.

    embedding or edge --enter--> home | seam, block | seam, block | ... --settle--> home --leave--> edge
    """

    def __init__(self, build: Build, regime: Regime, embed: Embed | None, blocks: list[Block]):
        self.regime = regime
        home, collectives = home_of(regime), build.collectives
        edge = lay(cp=WHOLE) if build.plan.whole_edges else home
        have = [home, *(block.gives.at(home) for block in blocks)]
        self.edge = cut_of(edge, collectives.mesh)
        self._home, self._have = cut_of(home, collectives.mesh), [cut_of(layout, collectives.mesh) for layout in have]
        self._build = build
        self.enter = Route(edge if embed is None else embed.gives.at(home), home, collectives)
        self.blocks = [(_seam(build, before, home, block), block) for before, block in zip(have, blocks, strict=False)]
        self.settle = None if build.last else Route(have[-1], home, collectives)
        self.leave = Route(home, edge, collectives)

    def strips(self, residual: torch.Tensor, deal: Deal) -> Sequence[torch.Tensor]:
        """The residual at home, as seams take it."""
        return residual.split(deal.sizes(self._home))

    def narrow(
        self, block: Block, normed: Strips, residual: Sequence[torch.Tensor], heads: Heads
    ) -> tuple[Strips, Sequence[torch.Tensor], Deal]:
        """What a block takes, the residual and the deal, such that from this block on there are only the rows of `heads`."""
        normed = normed.with_onward(heads.places(cut_of(block.takes.at(home_of(self.regime)), self._build.collectives.mesh)))
        return normed, [picked(joined([*residual]), heads.places(self._home))], heads  # the residual is here when what it gave is

    def end(self, x: Iterable[torch.Tensor | Addend], residual: Sequence[torch.Tensor], deal: Deal) -> torch.Tensor:
        """The residual with what the last block gives, as it is handed on."""
        assert self.settle is not None, "the last stage hands nothing on"
        landed = [self.settle.land(*each) for each in zip(x, residual, strict=True)]  # all strips: nothing is aside any more
        summed = [
            before if rows is None else before + self.settle(rows, strip) for strip, (rows, before) in zip(deal.strips, landed, strict=True)
        ]
        return self.leave(joined(summed), deal)

    def inner_seams(self, deal: Deal) -> Callable[[], None]:
        """What passes rows that mean nothing over two seams between blocks, a layer's, and computes nothing else: to be timed."""
        seams = [(seam, cut) for (seam, _), cut in zip(self.blocks, self._have, strict=False)][1:3]
        given = [(seam, self._zeros(deal.sizes(cut))) for seam, cut in seams]
        residual = self._zeros(deal.sizes(self._home))

        def run() -> None:
            for seam, x in given:
                normed, _ = seam(x, residual, deal)
                for _ in normed:  # else what passes in strips would go on aside, untimed
                    pass

        return run

    def _zeros(self, sizes: list[int]) -> Sequence[torch.Tensor]:
        return torch.zeros(sum(sizes), self._build.spec.hidden, dtype=self._build.dtype, device=self._build.device).split(sizes)

    def lines(self, enter: str = "enter") -> Iterator[str]:
        """Collectives in the order in which a step makes them: before each block, and inside it. `enter`: what the way in is called."""
        yield from _line(enter, self.enter)
        for seam, block in self.blocks:
            yield from _line(block.name, seam.settle, seam.spread, *block.within(self.regime))
        if self.settle is not None:
            yield from _line("leave", self.settle, self.leave)


def _line(part: str, *collectives: Route | str) -> Iterator[str]:
    said = ", ".join(filter(None, map(str, collectives)))
    if said:
        yield f"  {part:<15} {said}"


def _seam(build: Build, have: Layout, home: Layout, block: Block) -> Seam:
    hidden = build.spec.hidden
    return Seam(
        have,
        home,
        block.takes.at(home),
        build.collectives,
        weight=block.norm,
        eps=build.spec.eps,
        rms_norm=build.choices("rms_norm", hidden=hidden),
        add_rms_norm=build.choices("add_rms_norm", hidden=hidden),
    )
