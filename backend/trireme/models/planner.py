"""Planner: every way to spread a checkpoint over so many devices, checked as at load, best first. Predicts; runs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from typing import Any, Literal, NamedTuple

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings, revise
from trireme.models.forecast import Demand, Forecast, forecast
from trireme.models.hardware import Device
from trireme.models.spec import Spec
from trireme.parallel.plan import Plan


class Sizes(NamedTuple):
    """What the planner chooses: the settings of a plan, by their short names."""

    pp: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1
    moe_dp: int = 1
    sp: bool = False
    experts: Literal["gathered", "dispatched"] = "gathered"

    def __str__(self) -> str:
        """As on the command line."""
        words = [f"--{name.replace('_', '-')} {size}" for name, size in zip(self._fields, self[:5], strict=False) if size > 1]
        words += ["--sp on"] * self.sp + [f"--experts {self.experts}"] * (self.experts != "gathered")
        return " ".join(words) or "one rank"

    def settings(self, base: Settings) -> Settings:
        """The base settings, spread so. Refusal as for a settings file."""
        chosen = {SETTINGS[name]: value for name, value in self._asdict().items()}
        chosen["sequence_parallel"] = (base.sequence_parallel if base.sequence_parallel != "off" else "on") if self.sp else "off"
        return revise(base, chosen)

    def distance(self, other: Sizes) -> float:
        """How much changes from one to the other: doublings and halvings, then half a step for each of sp and experts."""
        steps = sum(abs(log2(mine) - log2(theirs)) for mine, theirs in zip(self[:5], other[:5], strict=True))
        return steps + 0.25 * ((self.sp != other.sp) + (self.experts != other.experts))


# Short name -> setting.
SETTINGS: Mapping[str, str] = {
    "pp": "pipeline_parallel_size",
    "tp": "tensor_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_parallel_size",
    "moe_dp": "moe_data_parallel_size",
    "sp": "sequence_parallel",
    "experts": "experts",
}


@dataclass(frozen=True)
class Option:
    """A legal plan."""

    sizes: Sizes
    plan: Plan
    forecast: Forecast

    @property
    def rank(self) -> tuple[Any, ...]:
        """To sort by, best first: those that fit, by tokens a second over the whole demand (to a thousandth, so that plans that
        differ in nothing that counts are taken in the order of their sizes); then by how much is missing."""
        fits, speed = self.forecast.fits, self.forecast.tokens_per_s
        return not fits, -float(f"{speed:.3g}"), self.forecast.missing_bytes, self.sizes


@dataclass(frozen=True)
class Refused:
    """Sizes that the validator turns down, and the legal ones that differ least: None where nothing is legal."""

    sizes: Sizes
    refusal: Refusal
    nearest: Sizes | None


@dataclass(frozen=True)
class Survey:
    """All that was looked at."""

    options: tuple[Option, ...]  # best first
    refused: tuple[Refused, ...]  # in the order of their sizes

    def folded(self) -> list[Option]:
        """The best of each five sizes: sp on or off, experts gathered or dispatched."""
        best: dict[tuple[int, ...], Option] = {}
        for option in self.options:
            best.setdefault(option.sizes[:5], option)
        return list(best.values())


def survey(
    spec: Spec, settings: Settings, num_gpus: int, device: Device, demand: Demand, item_bytes: int, fixed: Mapping[str, Any] | None = None
) -> Survey:
    """Every plan of exactly num_gpus ranks whose Sizes agree with `fixed`. `settings` brings what is not spread: the rows of a
    step, the link, a cut by hand."""
    options, turned_down = [], []
    for sizes in candidates(spec, num_gpus):
        if any(getattr(sizes, name) != value for name, value in (fixed or {}).items()):
            continue
        try:
            chosen = sizes.settings(settings)
            plan = Plan.of(chosen, spec)
        except Refusal as refusal:
            turned_down.append((sizes, refusal))
        else:
            options.append(Option(sizes, plan, forecast(spec, plan, chosen, device, demand, item_bytes)))
    options.sort(key=lambda option: option.rank)
    return Survey(tuple(options), tuple(Refused(sizes, why, nearest(sizes, options)) for sizes, why in _once(turned_down)))


def candidates(spec: Spec, num_gpus: int) -> Iterator[Sizes]:
    """All sizes whose ranks are num_gpus, legal or not. sp needs a tp to cut by, experts are dispatched along an ep, and without
    experts nothing divides them."""
    for pp in divisors(num_gpus):
        for cp in divisors(num_gpus // pp):
            tp = num_gpus // pp // cp
            for ep in divisors(tp * cp) if any(spec.sparse) else [1]:
                for moe_dp in divisors(tp * cp // ep) if any(spec.sparse) else [1]:
                    for sp in (False, True) if tp > 1 else (False,):
                        yield Sizes(pp, tp, cp, ep, moe_dp, sp)
                        if ep > 1:
                            yield Sizes(pp, tp, cp, ep, moe_dp, sp, "dispatched")


def nearest(sizes: Sizes, options: Sequence[Option]) -> Sizes | None:
    """The sizes of the option that differs least; of several, the best one."""
    return min(options, key=lambda option: (sizes.distance(option.sizes), option.rank)).sizes if options else None


def divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _once(turned_down: list[tuple[Sizes, Refusal]]) -> list[tuple[Sizes, Refusal]]:
    """Without those that only sp or experts tell from another of the same refusal."""
    first = {(sizes[:5], str(refusal)): (sizes, refusal) for sizes, refusal in reversed(turned_down)}
    return sorted(first.values(), key=lambda each: each[0])
