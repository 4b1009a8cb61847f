"""Regimes: the largest steps that the front may plan in each, and from how many rows on sequence parallelism pays on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from trireme.core.log import logger
from trireme.core.settings import Settings
from trireme.core.step import Regime
from trireme.models.decoder import Decoder
from trireme.parallel.comm import reach
from trireme.parallel.deal import Deal
from trireme.parallel.timing import device_seconds

_MEASURED = (64, 128, 256, 512, 1024)  # rows
_SP_AT_LATEST = 2048  # it is on there, since it saves memory even where it saves no time
_ROUNDS = 3


def measures_sp(settings: Settings, device: torch.device) -> bool:
    """Whether ranks find out from how many rows on sequence parallelism pays. It is then none of fewer rows than decode steps may have,
    so that graphs are made before it is known."""
    return device.type != "cpu" and settings.sequence_parallel == "on" and settings.sp_from is not None


def sizes_for_sp(settings: Settings, num_drafts: int) -> tuple[int, ...]:
    """Rows from which sequence parallelism may be on, where that is measured: more than any decode step has. From the last on it is."""
    drafting = min(settings.max_num_seqs, settings.mtp.max_batch_size)
    decodes = max(settings.max_num_seqs, drafting * (1 + num_drafts))
    latest = max(_SP_AT_LATEST, decodes + 1)
    return *(rows for rows in _MEASURED if rows > decodes), latest


def largest_steps(
    settings: Settings, regimes: Iterable[Regime], most_rows: int, num_drafts: int, device: torch.device
) -> Iterator[tuple[np.ndarray, Regime]]:
    """(rows of each item int32 [I], regime) of the steps that need the most memory: what is less than sequence or context parallelism
    wants is small."""
    for regime in regimes:
        rows, least = most_rows, 1
        if settings.sp_from is not None and not regime.sp:
            latest = sizes_for_sp(settings, num_drafts)[-1] if measures_sp(settings, device) else settings.sp_from
            rows = min(rows, latest - 1)
        if settings.context_parallel_size > 1:
            short = 2 * settings.context_parallel_size  # an item of fewer rows is not cut
            if regime.cp:
                least = short
            else:  # decodes and their drafts; prompts, where the longer ones have less than half of the rows
                rows = min(rows, settings.max_num_seqs * max(1 + num_drafts, 2 * (short - 1)))
        if rows >= least:
            yield spread(rows, min(settings.max_num_seqs, rows // least)), regime


def spread(num_rows: int, num_items: int) -> np.ndarray:
    """Rows dealt out evenly: int32 [num_items]."""
    return np.diff(np.arange(num_items + 1) * num_rows // num_items).astype(np.int32)


@torch.inference_mode()
def find_sp_from(settings: Settings, decoder: Decoder, give_up: Callable[[], bool]) -> int | None:
    """Rows of a step from which a layer's seams take no longer where the residual is cut over tp; None where settings say how many,
    or there is no GPU. All ranks of a stage call it together; the front hears rank 0. LinkLost where others do not come, in time or
    before `give_up` says so."""
    build, plain, cut = decoder.build, [], []
    if not measures_sp(settings, build.device):
        return None
    sizes = sizes_for_sp(settings, build.plan.mtp)

    def wait(event: torch.cuda.Event) -> None:
        reach(event, settings.step_timeout_s, give_up)

    for num_rows in sizes:
        for regime, found in ((Regime(), plain), (Regime(sp=True), cut)):
            deal = Deal(build.plan, build.rank, np.array([num_rows], np.int32), regime, build.device)
            found.append(device_seconds(decoder.inner_seams(deal), wait, num_rounds=_ROUNDS))
    rows = first_for_good(sizes, [one <= other for one, other in zip(cut, plain, strict=True)])
    times = ", ".join(f"{size}: {one * 1e6:.0f} / {other * 1e6:.0f}" for size, one, other in zip(sizes, cut, plain, strict=True))
    log = logger(f"stage_{build.stage} rank {build.rank}")
    log.info("sequence parallelism pays from %d rows on; us of a layer's seams with it / without: %s", rows, times)
    return rows


def first_for_good(sizes: tuple[int, ...], pays: list[bool]) -> int:
    """The first size from which on it pays at every one; the last where it never does."""
    never = [at for at, well in enumerate(pays[:-1]) if not well]
    return sizes[never[-1] + 1 if never else 0]
