"""Plan: how a model is spread, one frozen value. Which rank is where follows in mesh; nothing else knows a world size."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.core.step import Regime
from trireme.models.cut import cut_layers
from trireme.models.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the mesh's axes. A stage has tp * cp ranks; ep, moe_dp and moe_tp divide the same ranks for experts."""

    layer_cut: tuple[int, ...]  # layers of each stage
    tp: int = 1
    cp: int = 1
    ep: int = 1
    moe_dp: int = 1
    sp: bool = False  # whether some steps have the residual cut by rows over tp
    experts: Literal["gathered", "dispatched"] = "gathered"
    whole_edges: bool = False  # whether stages hand on every row, as the tensor link does, or each rank its own
    most_rows: int = 0  # of a step
    strip_rows: int = 0  # where the residual is cut, a step of more rows passes in two strips (see strips.py); 0: none does, nor by mail
    mtp: int = 0  # drafts of a sequence at the most, by the checkpoint's own head; 0: it is not loaded
    eplb: bool = False  # whether the loads of experts are counted, and which slots hold which may change
    num_redundant_experts: int = 0  # slots of a layer beyond its experts
    # among copies of an expert; the last two are dynamic with a router for benchmarks: fake is even, skewed prefers low numbers
    dispatch: Literal["dynamic", "static", "fake", "skewed"] = "dynamic"

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
        if self.num_redundant_experts < 0 or (self.num_redundant_experts and not self.eplb):
            raise Refusal(
                f"num_redundant_experts={self.num_redundant_experts} with eplb={self.eplb}",
                why="copies are of the experts that are busy, and only EPLB knows which are",
                fix="set eplb, or leave out num_redundant_experts",
            )
        if self.dispatch == "static" and self.experts == "gathered":
            raise Refusal(
                "dispatch=static with experts=gathered",
                why="all ranks see the same rows there, and if each chose its own copy of an expert rows would be computed twice, or never",
                fix="use dispatch=dynamic, or experts=dispatched",
            )

    def __str__(self) -> str:
        """As on the command line, without what is one or off: "pp2 tp2 ep2 sp mtp3"."""
        sizes = {"pp": self.pp, "tp": self.tp, "cp": self.cp, "moe_dp": self.moe_dp, "ep": self.ep}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        words += ["sp"] * self.sp + ["dispatched"] * (self.experts == "dispatched") + [f"mtp{self.mtp}"] * (self.mtp > 0)
        words += [f"eplb{self.num_redundant_experts or ''}"] * self.eplb + [self.dispatch] * (self.dispatch != "dynamic")
        return " ".join(words) or "one rank"

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

    @property
    def regimes(self) -> tuple[Regime, ...]:
        """All that steps may name."""
        return tuple(Regime(sp, cp) for sp, cp in product((False, True)[: 1 + self.sp], (False, True)[: 1 + (self.cp > 1)]))

    def strips(self, num_rows: int, regime: Regime) -> tuple[int, ...]:
        """Rows of the runs in which a step passes its blocks. Of two the first is dealt out evenly."""
        if not regime.sp or regime.cp or not self.strip_rows or num_rows <= max(self.strip_rows, self.tp):
            return (num_rows,)
        first = -(-num_rows // (2 * self.tp)) * self.tp
        return first, num_rows - first

    @property
    def mail_strips(self) -> int:
        """Strips of a step for which a GPU has memory for mail (see mail.py); 0: it has none."""
        if not self.sp or not self.strip_rows:
            return 0
        return 2 if self.most_rows > self.strip_rows else 1

    def layers(self, stage: int) -> range:
        """Numbers of a stage's layers, in the whole model."""
        start = sum(self.layer_cut[:stage])
        return range(start, start + self.layer_cut[stage])

    @classmethod
    def of(cls, settings: Settings, spec: Spec) -> Plan:
        """The plan that settings ask for. Refusal where the checkpoint cannot be spread so."""
        num_stages, cut = settings.pipeline_parallel_size, settings.layer_cut
        mtp, eplb = settings.mtp.num_drafts(spec.num_mtp_layers), settings.eplb
        most_rows = settings.max_num_batched_tokens
        auto = "static" if settings.experts == "dispatched" else "dynamic"
        if cut is not None and (sum(cut) != spec.num_layers or min(cut) < 1):
            raise Refusal(
                f"layer_cut={cut} does not cut {spec.num_layers} layers into {num_stages} stages",
                why="it names the layers of every stage, at least one each",
                fix=f"use layer_cut={cut_layers(spec, settings, mtp=mtp > 0)}, or leave it out",
            )
        plan = cls(
            layer_cut=tuple(cut or cut_layers(spec, settings, mtp=mtp > 0)),
            tp=settings.tensor_parallel_size,
            cp=settings.context_parallel_size,
            ep=settings.expert_parallel_size,
            moe_dp=settings.moe_data_parallel_size,
            sp=settings.sp_from is not None,
            experts=settings.experts,
            whole_edges=settings.link == "tensor",
            most_rows=most_rows,
            # no less than half a step, so that two strips have all of it; no more than a step: a mailbox is as large as a strip
            strip_rows=min(max(settings.strip_rows, -(-most_rows // 2)), most_rows) if settings.strip_rows else 0,
            mtp=mtp,
            eplb=eplb is not None,
            num_redundant_experts=0 if eplb is None else eplb.num_redundant_experts,
            dispatch="dynamic" if eplb is None else auto if eplb.dispatch == "auto" else eplb.dispatch,
        )
        plan.check(spec)
        return plan

    def check(self, spec: Spec) -> None:
        """Refusal where a checkpoint's heads, columns or experts do not fall into as many parts as there are ranks."""
        tp = self.tp
        _divides("tp", tp, spec.num_heads, "query heads", "each rank needs whole heads")
        kv_heads = spec.num_kv_heads
        if kv_heads % tp and tp % kv_heads:
            raise Refusal(
                f"tp={tp} does not divide {kv_heads} key/value heads, nor do they divide tp",
                why="each rank needs whole heads, or a whole copy of one",
                fix=f"use tp={_nearest(tp, spec.num_heads, lambda size: not (kv_heads % size and size % kv_heads))}",
            )
        if spec.delta is not None:
            why = "each rank needs whole heads, with all value heads that they serve"
            _divides("tp", tp, spec.delta.num_key_heads, "key heads of the delta rule", why)
        if not all(spec.sparse):
            _divides("tp", tp, spec.intermediate, "columns of the MLP", "each rank has equally many")
        if any(spec.sparse):
            self._check_slots(spec)
            _divides("moe_tp", self.moe_tp, spec.moe_intermediate, "columns of an expert", "moe_tp = tp * cp / (ep * moe_dp)")
            if self.experts == "dispatched" and self.ep > 1 and max(tp, self.moe_tp) % min(tp, self.moe_tp):
                raise Refusal(
                    f"experts=dispatched with tp={tp} and moe_tp={self.moe_tp}",
                    why="groups of one size must nest in groups of the other",
                    fix="use experts=gathered, or another ep",
                )
        elif self.ep > 1 or self.moe_dp > 1 or self.eplb:
            raise Refusal(
                f"ep={self.ep} and moe_dp={self.moe_dp}{' and eplb' * self.eplb} for a checkpoint without experts",
                why=f"{spec.family} is dense",
                fix=f"leave out ep and moe_dp{' and eplb' * self.eplb}",
            )

    def _check_slots(self, spec: Spec) -> None:
        redundant, most = self.num_redundant_experts, spec.num_experts * (self.ep - 1)
        if not redundant:
            _divides("ep", self.ep, spec.num_experts, "experts", "each rank has equally many slots")
        elif redundant > most:
            raise Refusal(
                f"num_redundant_experts={redundant} for {spec.num_experts} experts on ep={self.ep} ranks",
                why=f"with {most} every rank has every expert, and a second copy on one rank serves nothing",
                fix=f"use at most {most}" if most else "use an ep above 1, or leave it out",
            )
        elif (lacking := -(spec.num_experts + redundant) % self.ep) != 0:
            raise Refusal(
                f"ep={self.ep} does not divide {spec.num_experts} experts and {redundant} redundant ones",
                why="each rank has equally many slots",
                fix=f"use num_redundant_experts={redundant + lacking}",
            )


def _divides(axis: str, size: int, num: int, what: str, why: str) -> None:
    if num % size:
        raise Refusal(f"{axis}={size} does not divide {num} {what}", why=why, fix=f"use {axis}={_nearest(size, num)}")


def _nearest(size: int, num: int, legal=lambda size: True) -> int:
    """The divisor of num that is legal and next to size; the lesser of two."""
    return min((each for each in range(1, num + 1) if num % each == 0 and legal(each)), key=lambda each: (abs(each - size), each))
