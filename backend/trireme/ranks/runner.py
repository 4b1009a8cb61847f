"""Runner: Step -> Batch -> Decoder -> tokens, in one rank. Owns the caches, the page tables and the sampler rows; decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch

from trireme.core.batch import Batch
from trireme.core.devices import place_ranks
from trireme.core.log import logger
from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.core.step import PAGE, Clock, Outcome, PromptLogprobs, Step, array
from trireme.layers.block import Build
from trireme.models.decoder import Decoder
from trireme.models.registry import build_stage
from trireme.models.spec import read_spec
from trireme.parallel.context import Shared
from trireme.parallel.deal import Deal
from trireme.parallel.link import Link
from trireme.parallel.plan import Plan
from trireme.parallel.vocabulary import CutLogits
from trireme.ranks.fed import FedTokens
from trireme.ranks.logprobs import Prompts, Stretch
from trireme.ranks.rows import Rows, lay_out
from trireme.ranks.sampler import Sampler
from trireme.weights.load import fill_dummy, load
from trireme_kernels.choose import Choices


def load_runner(settings: Settings, stage: int, rank: int, progress: Callable[[str], None]) -> Runner:
    """A rank's part of the model, ready to run. `progress` gets clauses for a user. Refusal where it cannot be loaded."""
    torch.set_num_threads(settings.threads(settings.world))
    model_dir = Path(settings.model)
    spec = read_spec(model_dir)
    plan = Plan.of(settings, spec)
    device = _device(settings, stage, rank)
    auto = "float32" if device.type == "cpu" else spec.dtype
    dtype = getattr(torch, auto if settings.dtype == "auto" else settings.dtype)
    choices = Choices(device.type, dtype)
    log = logger(f"stage_{stage} rank {rank}")
    decoder = build_stage(Build(spec, plan, stage, device, dtype, choices, rank=rank))
    manifest = fill_dummy(decoder) if settings.load_format == "dummy" else load(decoder, model_dir, _in_percent(progress))
    runner = Runner(
        decoder,
        settings,
        stage,
        device=device,
        dtype=dtype,
        hidden=spec.hidden,
        vocab_size=spec.vocab_size,
        max_model_len=settings.max_model_len or spec.max_position_embeddings,
        choices=choices,
    )
    log.info("loaded %s; %d pages; implementations:\n%s", manifest, runner.num_pages, choices.table())
    return runner


def _device(settings: Settings, stage: int, rank: int) -> torch.device:
    """Where this rank computes, made current. A process sees all GPUs of its host and is told which is its own, since a worker
    of a pool is one rank after another, and CUDA reads what the environment shows only once."""
    placed = place_ranks(settings)
    if placed is None:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Refusal(
            f"torch {torch.__version__} finds no GPU, and this host has one",
            why="it is a build for CPUs, or does not fit the driver",
            fix="install a torch for CUDA where ranks run (TRIREME_PYTHON), or set device to cpu",
        )
    device = torch.device("cuda", placed[stage][rank])
    torch.cuda.set_device(device)
    return device


def _in_percent(progress: Callable[[str], None]) -> Callable[[int, int], None]:
    """Bytes read of bytes to read, told when another tenth is there."""
    told = -1

    def tell(read: int, to_read: int) -> None:
        nonlocal told
        if (tenth := 10 * read // max(1, to_read)) > told:
            told = tenth
            progress(f"is loading weights, {10 * tenth} %")

    return tell


class Runner:
    """One rank's computing. `begin` a link, `run` steps in order, `leave`."""

    def __init__(
        self,
        decoder: Decoder,
        settings: Settings,
        stage: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        hidden: int,
        vocab_size: int,
        max_model_len: int,
        choices: Choices,
    ):
        self.hidden, self.dtype = hidden, dtype
        self.collectives = decoder.build.collectives
        self._decoder, self._settings, self._stage, self._device = decoder, settings, stage, device
        self._is_first, self._is_last = stage == 0, stage == settings.num_stages - 1
        self.num_pages = settings.num_pages or self._num_pages_of_bytes()
        self._caches = [keep.allocate(self.num_pages, device) for keep in decoder.keeps]
        self._page_table = np.zeros((settings.max_num_seqs, -(-max_model_len // PAGE)), dtype=np.int32)
        self._sampler = Sampler(
            settings.max_num_seqs, vocab_size, device, choices("sample", vocab=vocab_size), choices("penalise", vocab=vocab_size)
        )
        self._vocab_size, self._along_vocabulary = vocab_size, self.collectives.along("tp")
        self._prompts = Prompts()
        self._link: Link | None = None
        self._fed = FedTokens(settings.max_num_seqs, settings.inflight)

    def begin(self, link: Link) -> None:
        """A new epoch: nothing is known of any sequence. Caches need no wiping, since no page is read before it is written."""
        self._link = link
        self._fed = FedTokens(self._settings.max_num_seqs, self._settings.inflight)
        self._sampler.clear()
        self._prompts.clear()

    def leave(self) -> None:
        """Drop the link and the groups, and everything on its way over them: only then are the other ends freed."""
        self._link = None
        self.collectives.leave()
        self._fed = FedTokens(self._settings.max_num_seqs, self._settings.inflight)

    @property
    def _joined(self) -> Link:
        """The epoch's link. Nobody else keeps it, so that `leave` drops it."""
        assert self._link is not None, "a step runs in an epoch"
        return self._link

    @torch.inference_mode()
    def run(self, step: Step, carried: np.ndarray | None, waited_s: float) -> tuple[Outcome, np.ndarray | None]:
        """`carried`: rows that came with the call (tensor link). -> outcome, rows that go with the answer (tensor link)."""
        began, start = time.time(), time.perf_counter()
        rows = self._read(step)
        deal = Deal(self._decoder.build.plan, self._decoder.build.rank, rows.counts, step.regime, self._device)
        ready = time.perf_counter()
        received = self._receive(step, rows, deal, carried)
        receiving_s = time.perf_counter() - ready

        stretches = self._prompts.stretches(rows)
        head_rows = np.concatenate([rows.sampled_rows, *(stretch.rows for stretch in stretches)])
        result = self._decoder.forward(self._batch(rows, deal, head_rows), deal, received)
        carries, outcome = None, Outcome(step.epoch, step.number, self._stage)
        if self._is_last:
            outcome = self._finish(step, rows, stretches, result)
        else:
            carries = self._joined.send(result)
        clock = Clock(began, waited_s, receiving_s, time.perf_counter() - start - receiving_s)
        return msgspec.structs.replace(outcome, clock=clock), carries

    def _read(self, step: Step) -> Rows:
        """What the step changes, then its rows."""
        writes = array(step.page_writes).reshape(-1, 3)
        self._page_table[writes[:, 0], writes[:, 1]] = writes[:, 2]
        if self._is_last:
            for opened in step.opens:
                self._sampler.open(opened)
                self._prompts.open(opened)
        return lay_out(step, self._page_table)

    def _receive(self, step: Step, rows: Rows, deal: Deal, carried: np.ndarray | None) -> torch.Tensor | None:
        """All that comes from other stages: rows, or in stage 0 the tokens fed back."""
        if self._is_first:
            self._fed.fill(rows.tokens, np.repeat(rows.slots, rows.counts))
            if step.returns and len(rows.sampled):
                self._fed.owe(step.number, rows.slots[rows.sampled], self._joined.expect_tokens(len(rows.sampled)))
        return self._joined.receive(self._decoder.num_edge_rows(deal), carried)

    def _batch(self, rows: Rows, deal: Deal, head_rows: np.ndarray) -> Batch:
        """This rank's part of a step. A chunk of an item sees the item's keys up to the chunk's own end."""
        mine, chunks = deal.own(), deal.chunks
        ends = (rows.starts[chunks.items] + chunks.begins + chunks.counts).astype(np.int32)
        page_table = self._page_table[rows.slots[chunks.items], : -(-int(ends.max(initial=0)) // PAGE)]
        return Batch(
            tokens=self._tensor(rows.tokens[mine]),
            positions=self._tensor(rows.positions[mine]),
            pages=self._tensor(rows.pages[mine]),
            attention=self._decoder.plan_attention(chunks.counts.astype(np.int32), ends, page_table),
            shared=self._shared(rows, deal),
            caches=self._caches,
            head_rows=self._tensor(head_rows),
        )

    def _shared(self, rows: Rows, deal: Deal) -> Shared | None:
        if not deal.regime.cp:
            return None
        every = [deal.own(rank) for rank in self.collectives.mesh.spans["cp"].members(self.collectives.rank)]
        return Shared([len(own) for own in every], self._tensor(rows.pages[np.concatenate(every)]))

    def _finish(self, step: Step, rows: Rows, stretches: list[Stretch], columns: torch.Tensor) -> Outcome:
        """The last stage's part: sample, send tokens back first of all, then say what was asked of logprobs."""
        num_samples = len(rows.sampled)
        if not num_samples and not stretches:
            return Outcome(step.epoch, step.number, self._stage)
        logits = CutLogits(columns, self._vocab_size, self._along_vocabulary)
        samples = logits.select(slice(0, num_samples))
        sampled = self._sampler.sample(samples, rows.slots[rows.sampled], rows.ends[rows.sampled], self._bans(step, rows))
        tokens = sampled.tokens.to("cpu", torch.int32)
        if step.returns and num_samples:
            self._joined.send_tokens(tokens)
        told: list[PromptLogprobs] = []
        at = num_samples
        for stretch in stretches:
            told.append(stretch.describe(logits.select(slice(at, at + len(stretch.rows)))))
            at += len(stretch.rows)
        return Outcome(
            step.epoch, step.number, self._stage, tokens=tokens.numpy().tobytes(), logprobs=sampled.logprobs(), prompt_logprobs=told
        )

    def _bans(self, step: Step, rows: Rows) -> list[tuple[int, list[int]]]:
        """A step names items; the sampler names sampled rows."""
        return [(int(np.searchsorted(rows.sampled, item)), ids) for item, ids in step.bans]

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)

    def _num_pages_of_bytes(self) -> int:
        page_bytes = sum(keep.bytes_per_page for keep in self._decoder.keeps)
        num_bytes = self._settings.kv_cache_memory_bytes or 1 << 30
        num_pages = num_bytes // page_bytes
        if not num_pages:
            raise Refusal(
                f"kv_cache_memory_bytes={num_bytes} holds no page",
                why=f"a page of {PAGE} tokens takes {page_bytes} bytes in stage_{self._stage}",
                fix="raise kv_cache_memory_bytes",
            )
        return num_pages
