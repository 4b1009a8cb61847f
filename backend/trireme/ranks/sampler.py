"""Sampler: logits of the last stage to tokens. Keeps one row of parameters a slot, written when a sequence opens it.

The parameters stand in host memory: which rows need what is decided there, without asking the device, so that a step is
launched without waiting. What is computed on logits is the ops `penalise` and `sample`. A greedy step that asks for nothing
else costs one argmax. Where columns are cut over ranks, all ranks sample alike, and gather whole only those rows that need it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from trireme.core.step import Open, array
from trireme.parallel.vocabulary import CutLogits
from trireme.ranks.logprobs import Described
from trireme.ranks.staging import upload

_FEW = 64  # up to this top_k rows that are cut over ranks are drawn from their highest alone
_ROW = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("seed", np.int64),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("prompt_len", np.int64),
        ("min_tokens", np.int64),
        ("num_logprobs", np.int64),  # -1: not asked
        ("penalises", np.bool_),
        ("biased", np.bool_),
        ("banned", np.bool_),  # has words of one token that must not appear
    ],
    align=True,  # so that torch can take a column
)


@dataclass
class _Seen:
    """What a penalising sequence has said; only such sequences have it."""

    prompt: torch.Tensor  # bool [V]
    output_counts: torch.Tensor  # int32 [V]


class _Wanted(NamedTuple):
    """What some rows of a step want."""

    slots: np.ndarray  # int [n]
    rows: np.ndarray  # _ROW [n]
    positions: np.ndarray  # int [n]: where the sampled token will stand
    banned: Mapping[int, list[int]]  # row -> tokens that must not be sampled now

    @property
    def changes(self) -> np.ndarray:
        """Rows, bool [n], of which logits change before a token is drawn."""
        changes = self.rows["penalises"] | self.rows["biased"]
        changes[list(self.banned)] = True
        return changes

    def pick(self, which: np.ndarray) -> _Wanted:
        banned = {row: self.banned[at] for row, at in enumerate(which) if at in self.banned}
        return _Wanted(self.slots[which], self.rows[which], self.positions[which], banned)


@dataclass(frozen=True)
class Sampled:
    """Tokens of one step, and what is needed to describe those whose logprobs were asked."""

    tokens: torch.Tensor  # int64 [n]
    asked: np.ndarray  # int64 [a]: rows of n
    num_top: np.ndarray  # int64 [a]
    raw: CutLogits | None  # [a]: logits before anything changed them

    def describe(self) -> Described | None:
        """Of the rows that asked, in their order. All ranks call it, or none."""
        if self.raw is None:
            return None
        [asked] = upload([self.asked], self.tokens.device)
        return Described(self.raw.select, self.tokens[asked], self.num_top)


class Sampler:
    """`sample` and `penalise` are the chosen implementations of these ops."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device, sample: Callable, penalise: Callable):
        self._max_num_seqs, self._vocab_size, self._device = max_num_seqs, vocab_size, device
        self._sample, self._penalise = sample, penalise
        self._one = torch.ones(1, dtype=torch.int32, device=device)
        self.clear()

    def clear(self) -> None:
        """Forget all sequences."""
        self._rows = np.zeros(self._max_num_seqs, dtype=_ROW)
        self._bias: dict[int, tuple[torch.Tensor, ...]] = {}  # ids, what is added
        self._stops: dict[int, list[int]] = {}
        self._banned: dict[int, list[int]] = {}
        self._seen: dict[int, _Seen] = {}

    def open(self, opened: Open) -> None:
        """A sequence takes a slot."""
        slot, sampling = opened.slot, opened.sampling
        banned = [word[0] for word in sampling.bad_words if len(word) == 1]
        for table in (self._bias, self._stops, self._banned, self._seen):
            table.pop(slot, None)
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias.items(), strict=True)
            ids, values = np.array(ids, dtype=np.int64), np.array(values, dtype=np.float32)
            self._bias[slot] = tuple(upload([ids, values], self._device))
        if sampling.min_tokens:
            self._stops[slot] = list(sampling.stop_token_ids)
        if banned:
            self._banned[slot] = banned
        if sampling.penalises:
            self._seen[slot] = self._read(array(opened.history), opened.prompt_len)
        self._rows[slot] = (
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            _as_int64(sampling.seed),
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            opened.prompt_len,
            sampling.min_tokens,
            -1 if sampling.logprobs is None else sampling.logprobs,
            sampling.penalises,
            bool(sampling.logit_bias),
            bool(banned),
        )

    def sample(self, logits: CutLogits, slots: np.ndarray, positions: np.ndarray, bans: Sequence[tuple[int, list[int]]]) -> Sampled:
        """`logits`: of n rows, changed in place; `slots`: int [n]; `positions`: int [n], where the sampled token will stand;
        `bans`: (row, token ids) that must not be sampled now."""
        rows = self._rows[slots]
        wanted = _Wanted(slots, rows, positions, self._banned_now(slots, rows, positions, bans))
        asked = np.flatnonzero(rows["num_logprobs"] >= 0)
        raw = logits.select(self._there(asked)) if len(asked) else None  # a copy, before anything changes
        changes = wanted.changes
        if not (changes.any() or rows["temperature"].any()):
            tokens = logits.argmax()
        elif logits.along.size == 1:
            tokens = self._draw_whole(logits.local, wanted)
        else:
            tokens = self._draw_cut(logits, wanted, changes)
        return Sampled(tokens, asked, rows["num_logprobs"][asked], raw)

    def _banned_now(self, slots: np.ndarray, rows: np.ndarray, positions: np.ndarray, bans: Sequence) -> Mapping[int, list[int]]:
        """Every kind of ban is (row, token ids). The place for grammars."""
        banned = defaultdict(list)
        for row in np.flatnonzero(positions - rows["prompt_len"] < rows["min_tokens"]):
            banned[row] += self._stops[slots[row]]
        for row in np.flatnonzero(rows["banned"]):
            banned[row] += self._banned[slots[row]]
        for row, ids in bans:
            banned[row] += ids
        return {row: ids for row, ids in banned.items() if ids}

    def _draw_cut(self, logits: CutLogits, wanted: _Wanted, changes: np.ndarray) -> torch.Tensor:
        """Tokens int64 [n], the same as of whole rows, by three ways: what no filter joins is drawn by each rank among its own
        columns, and the best of the ranks' draws wins, also where a filter only says how likely a token must be; the few that a
        small top_k leaves to top_p are drawn among the highest of all ranks; only what is left is gathered whole."""
        rows = wanted.rows
        filtered = (rows["temperature"] > 0) & ((rows["top_k"] > 0) | (rows["top_p"] < 1) | (rows["min_p"] > 0))
        small = ~changes & (rows["top_k"] <= _FEW)
        bounded = filtered & small & (rows["top_p"] >= 1)
        few = filtered & small & ~bounded & (rows["top_k"] > 0)
        whole = changes | (filtered & ~few & ~bounded)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        if len(which := np.flatnonzero(~few & ~whole)):
            there = self._there(which) if len(which) < len(rows) else slice(None)  # of which no copy is made
            part, picked = logits.select(there), wanted.pick(which)
            local = part.local
            if bounded.any():
                local, picked = self._bounded(part, picked)
            drawn, scores = self._draw(local, picked, part.ids)
            tokens[there] = part.best(scores, drawn)
        if len(which := np.flatnonzero(few)):
            there = self._there(which)
            tokens[there], settled = self._draw_few(logits.select(there), wanted.pick(which))
            whole[which] = ~settled
        if len(which := np.flatnonzero(whole)):
            there = self._there(which)
            tokens[there] = self._draw_whole(logits.select(there).full(), wanted.pick(which))
        return tokens

    def _bounded(self, logits: CutLogits, wanted: _Wanted) -> tuple[torch.Tensor, _Wanted]:
        """(this rank's columns, -inf where top_k or min_p drop them; what is wanted, without these): both keep what is not below a
        number, which the highest of all ranks tell, however many tie with it."""
        rows = wanted.rows.copy()
        top_k = np.where(rows["temperature"] > 0, np.minimum(rows["top_k"], logits.vocab_size), 0)
        min_p = np.where(rows["temperature"] > 0, rows["min_p"], 0).astype(np.float32)
        heat = np.where(rows["temperature"] > 0, rows["temperature"], 1).astype(np.float32)
        values = logits.highest(max(1, int(top_k.max())))
        heat, last, all_, share = upload([heat, np.maximum(top_k - 1, 0), top_k == 0, min_p], self._device)
        scaled = values / heat[:, None]  # in the same order
        kth = scaled.gather(1, last[:, None])[:, 0].masked_fill(all_, -torch.inf)
        least = torch.maximum(kth, scaled[:, 0] + share.log())
        rows["top_k"], rows["min_p"] = 0, 0
        dropped = logits.local / heat[:, None] < least[:, None]
        return logits.local.masked_fill(dropped, -torch.inf), wanted._replace(rows=rows)

    def _draw_few(self, logits: CutLogits, wanted: _Wanted) -> tuple[torch.Tensor, np.ndarray]:
        """(tokens int64 [n], bool [n]: whether that token is sure). What ties with the last of top_k survives it, so a row is
        settled only where one logit more than top_k shows that no such tie goes on."""
        top_k = np.minimum(wanted.rows["top_k"], logits.vocab_size)
        num = min(int(top_k.max()) + 1, logits.vocab_size)
        values, ids = logits.topk(num)
        temperature, last = upload([wanted.rows["temperature"], top_k - 1], self._device)
        scaled = values / temperature[:, None]  # distinct logits may be equal once they are divided
        kth = scaled.gather(1, last[:, None])[:, 0]
        settled = (scaled[:, -1] < kth).cpu().numpy() | (num == logits.vocab_size)
        ids, order = ids.sort(dim=-1)
        return self._draw(values.gather(1, order), wanted, ids)[0], settled

    def _draw_whole(self, logits: torch.Tensor, wanted: _Wanted) -> torch.Tensor:
        """`logits`: fp32 [n, V], changed in place -> tokens int64 [n]."""
        slots, rows, _, banned = wanted
        penalised = np.flatnonzero(rows["penalises"])
        there = self._there(penalised)
        if len(penalised):
            logits[there] = self._penalised(logits[there], slots[penalised], rows[penalised])
        for row in np.flatnonzero(rows["biased"]):
            ids, values = self._bias[slots[row]]
            logits[row, ids] += values
        if banned:
            at = np.repeat(list(banned), [len(ids) for ids in banned.values()])
            ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in banned.values()])
            logits.index_put_(tuple(upload([at, ids], self._device)), logits.new_full((), -torch.inf))
        tokens, _ = self._draw(logits, wanted)
        if len(penalised):
            for slot, token in zip(slots[penalised], tokens[there].split(1), strict=True):
                self._seen[slot].output_counts.index_add_(0, token, self._one)
        return tokens

    def _penalised(self, logits: torch.Tensor, slots: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        seen = [self._seen[slot] for slot in slots]
        prompts, counts = torch.stack([one.prompt for one in seen]), torch.stack([one.output_counts for one in seen])
        parameters = upload([rows[name] for name in ("repetition", "presence", "frequency")], self._device)
        return self._penalise(logits, prompts, counts, *parameters)

    def _draw(self, logits: torch.Tensor, wanted: _Wanted, ids: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The op `sample`: (tokens int64 [n], scores fp32 [n]). `ids`: the columns' tokens, where they are not all."""
        parameters = [wanted.rows[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed")]
        return self._sample(logits, *upload([*parameters, wanted.positions.astype(np.int64)], self._device), ids)

    def _there(self, rows: np.ndarray) -> torch.Tensor:
        """Numbers of rows, on the device."""
        return upload([rows], self._device)[0]

    def _read(self, history: np.ndarray, prompt_len: int) -> _Seen:
        prompt = torch.zeros(self._vocab_size, dtype=torch.bool)
        prompt[torch.from_numpy(history[:prompt_len].astype(np.int64))] = True
        counts = torch.bincount(torch.from_numpy(history[prompt_len:].astype(np.int64)), minlength=self._vocab_size)
        return _Seen(prompt.to(self._device), counts.to(self._device, torch.int32))


def _as_int64(seed: int) -> int:
    """Users give unsigned 64-bit seeds as well; the same bits, signed."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
