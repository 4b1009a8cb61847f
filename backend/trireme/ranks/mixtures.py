"""Mixtures: what a rank does for the balance of experts, beside computing: which maps are in force, what was laid ready, what was
counted. Which maps are good the service decides, and when they change the front."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from trireme.core.settings import Settings
from trireme.models.decoder import Decoder
from trireme.parallel.placement import fingerprint
from trireme.parallel.relocation import Mixture, Relocation, Unprepared
from trireme.ranks.staging import download


class MapLost(RuntimeError):
    """The stage has expert maps that this rank neither has nor laid ready: only loading anew helps."""


class Mixtures:
    """Of all layers with experts in one rank; the head's that drafts is the last. `prepare` may run beside all else."""

    def __init__(self, decoder: Decoder, settings: Settings):
        build = decoder.build
        assert settings.eplb is not None, "the plan says so"
        self._layers, self._device, self._limit_s = decoder.mixtures, build.device, settings.step_timeout_s
        self._alike = build.collectives.along(self._layers[0].strategy.owes)  # ranks that must choose the same copies
        self._relocation: Relocation | None = None
        if build.plan.ep > 1:  # else there is nowhere to go
            moved = [
                Mixture(layer.placement, [param for param in layer.parameters() if param.cuts[0].stacked])  # pyright: ignore
                for layer in self._layers
            ]
            along = build.collectives.along("ep", use="eplb")
            self._relocation = Relocation(along, moved, most_layers=settings.eplb.layers_per_step, version=build.map_version)

    @property
    def version(self) -> int:
        """Of the maps in force."""
        return self._relocation.version if self._relocation is not None else 0

    def prepare(self, version: int, maps: Mapping[int, np.ndarray]) -> int:
        """See Relocation.prepare."""
        if self._relocation is None:
            raise Unprepared("with ep=1 every expert is here")
        return self._relocation.prepare(version, maps)

    def commit(self, version: int) -> None:
        """Steps from now on have these maps. MapLost, by name, where they were not laid ready."""
        if self._relocation is None or self._relocation.staged != version:
            ready = self._relocation.staged if self._relocation is not None else 0
            raise MapLost(f"expert maps of version {version} are neither in force ({self.version}) nor laid ready ({ready})")
        self._relocation.commit(version)

    def settle(self, version: int) -> None:
        """The epoch is over: maps that a step was stamped with anywhere in the stage are put in force here, too, and others that were
        laid ready are dropped."""
        if version != self.version:
            self.commit(version)
        if self._relocation is not None:
            self._relocation.drop()

    def begin(self, give_up: Callable[[], bool]) -> str:
        """An epoch: how experts will go from rank to rank, in words, if there is anything to say. LinkLost where other ranks of the stage
        do not come, or `give_up` says so."""
        self.forget()
        return self._relocation.warm_up(self._limit_s, give_up) if self._relocation is not None else ""

    def forget(self) -> None:
        """What was counted, and chosen, before."""
        for layer in self._layers:
            layer.picks = None
            if layer.loads is not None:
                layer.loads.zero_()

    def report(self, *, eager: bool) -> Callable[[], bytes]:
        """What was counted since the last report, zeroed here. What is returned reads it once the device has come so far: int32
        [layers, num_experts], or nothing where other ranks count. Of an `eager` step ranks compare the copies that they chose."""
        loads = [layer.loads for layer in self._layers if layer.loads is not None]
        counted = download(torch.stack(loads)) if loads else None
        chosen = self._compare() if eager else None
        self.forget()

        def read() -> bytes:
            if chosen is not None and not chosen.all():
                differ = chosen.logical_not().nonzero().flatten().tolist()
                raise RuntimeError(f"ranks that see the same rows chose other copies of experts than each other, in layers {differ}")
            return b"" if counted is None else counted.numpy().tobytes()

        return read

    def _compare(self) -> torch.Tensor | None:
        """bool [layers]: whether all ranks that see the same rows sent them to the same slots."""
        picks = [layer.picks for layer in self._layers if layer.picks is not None]  # the head that drafts may not have run
        if self._alike.size == 1 or not picks:
            return None
        mine = torch.stack([fingerprint(pick) for pick in picks], 1)  # [1, layers]
        every = self._alike.all_gather(mine, [1] * self._alike.size)
        return download((every == every[0]).all(0))
