"""Stages of a checkpoint chained in this process, every rank in a thread: Decoders driven with Batches, no runner, no scheduler."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from threads import Boards, on_every_rank
from trireme.core.batch import Attend, Batch, Items
from trireme.core.step import PAGE, Regime
from trireme.layers.block import Build, PerRequest, PerToken
from trireme.models.decoder import Computed, Decoder
from trireme.models.registry import build_stage
from trireme.models.spec import read_spec
from trireme.parallel.context import Shared
from trireme.parallel.deal import Deal
from trireme.parallel.plan import Plan
from trireme.parallel.zigzag import rows_of
from trireme.weights.load import load
from trireme_kernels.choose import Choices

Maps = Mapping[int, np.ndarray]  # of a stage's layers with experts, by number


def build_decoder(
    model_dir: Path,
    plan: Plan | Sequence[int],
    stage: int,
    dtype: torch.dtype = torch.float32,
    *,
    rank: int = 0,
    device: str = "cpu",
    maps: Maps = MappingProxyType({}),
) -> Decoder:
    """An empty stage, as one rank has it; a plan's layer cut alone stands for one rank a stage."""
    plan = plan if isinstance(plan, Plan) else Plan(layer_cut=tuple(plan))
    spec, choices = read_spec(model_dir), Choices(device, dtype)
    return build_stage(Build(spec, plan, stage, torch.device(device), dtype, choices, rank=rank, maps=maps))


def move_experts(decoders: Sequence[Decoder], maps: Maps, version: int) -> None:
    """New maps on all ranks of a stage: each slot's rows are copied from any that had them, and then the maps are rewritten."""
    span = decoders[0].build.collectives.mesh.spans["ep"]
    for number, map in maps.items():
        every = [decoder.mixtures[number] for decoder in decoders]
        old = [[param.data.clone() for param in (each.gate_up, each.down)] for each in every]
        for rank, each in enumerate(every):
            before, members, num_slots = each.placement.map, span.members(rank), each.placement.slots_per_rank
            each.placement.rewrite(map, version)
            for slot, expert in enumerate(each.placement.here):
                giver, row = divmod(int(np.flatnonzero(before == expert)[-1]), num_slots)
                for param, held in zip((each.gate_up, each.down), old[members[giver]], strict=True):
                    param.data[slot] = held[row]


class Passed(NamedTuple):
    """A rank's part of the last step."""

    batch: Batch
    deal: Deal
    computed: Computed


class Chained:
    """All stages of a checkpoint with pools of their own. Sequences are numbered; each has `num_pages` pages, scattered, and where
    blocks keep states the slot of its number, which may hold `num_held` rows. `maps` are each stage's first ones, if not trivial."""

    def __init__(
        self,
        model_dir: Path,
        plan: Plan | Sequence[int],
        *,
        num_sequences: int = 4,
        max_len: int = 256,
        num_held: int = 0,
        maps: Sequence[Maps] | None = None,
    ):
        self.plan = plan if isinstance(plan, Plan) else Plan(layer_cut=tuple(plan))
        num_pages = -(-max_len // PAGE)
        shuffled = np.random.default_rng(0).permutation(num_sequences * num_pages).astype(np.int32)
        self._page_table = shuffled.reshape(num_sequences, num_pages)
        self._lens = [0] * num_sequences
        self.passed: dict[tuple[int, int], Passed] = {}  # by (stage, rank)
        self.decoders: list[list[Decoder]] = []  # [stage][rank]
        self._caches = []
        self.boards = []
        for stage in range(self.plan.pp):
            placed = {} if maps is None else maps[stage]
            boards = Boards()
            decoders = [build_decoder(model_dir, self.plan, stage, rank=rank, maps=placed) for rank in range(self.plan.ranks)]
            for decoder in decoders:
                load(decoder, model_dir)
                decoder.build.collectives.begin(boards.groups(decoder.build.collectives))
            self.decoders.append(decoders)

            def allocate(keeps: PerToken | PerRequest) -> tuple[torch.Tensor, ...]:
                if isinstance(keeps, PerToken):
                    return keeps.allocate(shuffled.size, torch.device("cpu"))
                return keeps.allocate(num_sequences, 0, num_held, torch.device("cpu"))

            self._caches.append([[allocate(keeps) for keeps in each.keeps] for each in decoders])
            self.boards.append(boards)

    def forward(
        self,
        new: dict[int, Sequence[int]],
        *,
        head_rows: Sequence[int] | None = None,
        alone: bool = False,
        regime: Regime = Regime(),
        holds: Collection[int] = (),
        replays: Mapping[int, int] = MappingProxyType({}),
    ) -> torch.Tensor:
        """One step: tokens that each sequence gets. Logits [rows, V] of all of them in order, or of the step's `head_rows`, whose
        queries may be planned `alone`. The tokens of sequences in `holds` may not stand: the next step says how many do, in `replays`."""
        for sequence, num_rows in replays.items():
            self._lens[sequence] += num_rows
        counts = np.array([len(tokens) for tokens in new.values()], dtype=np.int32)
        starts = np.array([self._lens[sequence] for sequence in new], dtype=np.int32)
        for sequence, tokens in new.items():
            self._lens[sequence] += 0 if sequence in holds else len(tokens)
        tables = self._page_table[list(new)]
        tokens = np.concatenate([np.asarray(each) for each in new.values()])
        positions = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
        owners = np.repeat(np.arange(len(new)), counts)
        pages = tables[owners, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
        asked = None if head_rows is None else np.asarray(head_rows, np.int64)

        def run(rank: int, stage: int, came: torch.Tensor | None) -> torch.Tensor:
            decoder, deal = self.decoders[stage][rank], Deal(self.plan, rank, counts, regime, head_rows=asked)

            def attention(deal: Deal) -> Mapping[int, Attend]:
                chunks = deal.chunks
                ends = starts[chunks.items] + chunks.begins + chunks.counts
                return decoder.plan_attention(chunks.counts, ends, tables[chunks.items])

            mine = rows_of(deal.chunks, counts)
            context = [deal.own(other) for other in range(rank % self.plan.tp, self.plan.ranks, self.plan.tp)]
            every = np.concatenate(context)
            shared = Shared([len(rows) for rows in context], torch.from_numpy(positions[every]), torch.from_numpy(pages[every]))
            batch = Batch(
                tokens=torch.from_numpy(tokens[mine]),
                positions=torch.from_numpy(positions[mine]),
                pages=torch.from_numpy(pages[mine]),
                attention=attention(deal),
                shared=shared if regime.cp else None,
                caches=self._caches[stage][rank],
                items=Items(
                    slots=torch.tensor(list(new)),
                    fresh=torch.from_numpy(starts == 0),
                    counts=counts,
                    replays=np.array([replays.get(sequence, 0) for sequence in new], dtype=np.int32),
                    holds=np.array([sequence in holds for sequence in new]),
                    plans={},
                ),
                attend_heads=(lambda: attention(deal.heads or deal)) if alone else None,
            )
            if came is not None:
                assert len(came) == decoder.num_edge_rows(deal)
            self.passed[stage, rank] = Passed(batch, deal, computed := decoder.forward(batch, deal, came))
            return computed.rows

        rows: list[torch.Tensor | None] = [None] * self.plan.ranks
        for stage, boards in enumerate(self.boards):
            came = rows
            rows = list(on_every_rank(self.plan.ranks, lambda rank: run(rank, stage, came[rank]), boards))  # noqa: B023
        return torch.cat(rows[: self.plan.tp], dim=1)

    def restart(self, sequence: int) -> None:
        """Its slot and pages are another sequence's now."""
        self._lens[sequence] = 0

    def greedy(self, prompt: Sequence[int], max_tokens: int, sequence: int = 0, regime: Regime = Regime()) -> list[int]:
        """The prompt in one step, then token by token."""
        answer, new = [], list(prompt)
        while len(answer) < max_tokens:
            token = int(self.forward({sequence: new}, head_rows=[len(new) - 1], regime=regime).argmax())
            answer.append(token)
            new, regime = [token], Regime(sp=regime.sp)
        return answer
