"""Plan: how a model is spread, one frozen value. Which rank is where follows in mesh; nothing else knows a world size."""

from __future__ import annotations

from dataclasses import dataclass

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.models.cost import cut_layers
from trireme.models.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the mesh's axes. A stage has tp * cp ranks; ep, moe_dp and moe_tp divide the same ranks for experts."""

    layer_cut: tuple[int, ...]  # layers of each stage
    tp: int = 1
    cp: int = 1
    ep: int = 1
    moe_dp: int = 1
    sp: bool = False  # whether the residual lives cut by rows over tp

    def __post_init__(self):
        if min(self.tp, self.cp, self.ep, self.moe_dp) < 1 or not self.layer_cut:
            raise Refusal(f"{self}: a size is below one", why="an axis has at least one rank", fix="leave it out")
        if self.ranks % (self.ep * self.moe_dp):
            raise Refusal(
                f"ep={self.ep} times moe_dp={self.moe_dp} does not divide the {self.ranks} ranks of a stage",
                why="ranks = moe_dp * ep * moe_tp",
                fix="choose ep and moe_dp whose product divides tp * cp",
            )
        if self.moe_dp not in (1, self.cp):
            raise Refusal(
                f"moe_dp={self.moe_dp} with cp={self.cp}",
                why="a copy of the experts serves the rows of one context shard, or of all",
                fix=f"use moe_dp=1 or moe_dp={self.cp}",
            )

    @property
    def pp(self) -> int:
        return len(self.layer_cut)

    @property
    def ranks(self) -> int:
        """Ranks of one stage."""
        return self.tp * self.cp

    @property
    def moe_tp(self) -> int:
        return self.ranks // (self.ep * self.moe_dp)

    @property
    def world(self) -> int:
        return self.pp * self.ranks

    def layers(self, stage: int) -> range:
        """Numbers of a stage's layers, in the whole model."""
        start = sum(self.layer_cut[:stage])
        return range(start, start + self.layer_cut[stage])

    @classmethod
    def of(cls, settings: Settings, spec: Spec) -> Plan:
        """The plan that settings ask for. Refusal where the checkpoint cannot be spread so."""
        if settings.tensor_parallel_size != 1:
            raise Refusal(
                f"tensor_parallel_size={settings.tensor_parallel_size}",
                why="a stage has one rank so far",
                fix="leave it out and raise pipeline_parallel_size",
            )
        num_stages, cut = settings.pipeline_parallel_size, settings.layer_cut
        if cut is None:
            return cls(layer_cut=tuple(cut_layers(spec, num_stages)))
        if sum(cut) != spec.num_layers or min(cut) < 1:
            raise Refusal(
                f"layer_cut={cut} does not cut {spec.num_layers} layers into {num_stages} stages",
                why="it names the layers of every stage, at least one each",
                fix=f"use layer_cut={cut_layers(spec, num_stages)}, or leave it out",
            )
        return cls(layer_cut=tuple(cut))
