"""Sampler: logits of the last stage to tokens. Keeps one row of parameters a slot, written when a sequence opens it.

The parameters stand in host memory (which rows need what is decided there, without asking the device); what is computed
on logits is the ops `penalise` and `sample`. A greedy step that asks for nothing else costs one argmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trireme.core.request import Logprobs
from trireme.core.step import Open, array
from trireme.ranks.logprobs import describe

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
        ("plain", np.bool_),  # greedy and nothing else, once min_tokens are there
    ]
)


@dataclass
class _Seen:
    """What a penalising sequence has said; only such sequences have it."""

    prompt: torch.Tensor  # bool [V]
    output_counts: torch.Tensor  # int32 [V]


@dataclass(frozen=True)
class Sampled:
    """Tokens of one step, and what is needed to describe those whose logprobs were asked."""

    tokens: torch.Tensor  # int64 [n]
    asked: np.ndarray  # int64 [a]: rows of n
    num_top: np.ndarray  # int64 [a]
    raw: torch.Tensor | None  # fp32 [a, V]: logits before anything changed them

    def logprobs(self) -> list[Logprobs | None]:
        """One for each token, None where not asked; empty where nobody asked."""
        if self.raw is None:
            return []
        found: list[Logprobs | None] = [None] * len(self.tokens)
        for row, value in zip(self.asked, describe(self.raw, self.tokens[self.asked], self.num_top), strict=True):
            found[row] = value
        return found


class Sampler:
    """`sample` and `penalise` are the chosen implementations of these ops."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device, sample: Callable, penalise: Callable):
        self._max_num_seqs, self._vocab_size, self._device = max_num_seqs, vocab_size, device
        self._sample, self._penalise = sample, penalise
        self.clear()

    def clear(self) -> None:
        """Forget all sequences."""
        self._rows = np.zeros(self._max_num_seqs, dtype=_ROW)
        self._bias: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # ids, what is added
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
            self._bias[slot] = (torch.tensor(ids, device=self._device), torch.tensor(values, dtype=torch.float32, device=self._device))
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
            sampling.greedy and sampling.logprobs is None and not (sampling.penalises or sampling.logit_bias or banned),
        )

    def sample(self, logits: torch.Tensor, slots: np.ndarray, positions: np.ndarray, bans: Sequence[tuple[int, list[int]]]) -> Sampled:
        """`logits`: fp32 [n, V], changed in place; `slots`: int [n]; `positions`: int [n], where the sampled token will stand;
        `bans`: (row, token ids) that must not be sampled now."""
        rows = self._rows[slots]
        young = positions - rows["prompt_len"] < rows["min_tokens"]
        if rows["plain"].all() and not young.any() and not bans:
            return Sampled(logits.argmax(-1), slots[:0], slots[:0], None)
        asked = np.flatnonzero(rows["num_logprobs"] >= 0)
        raw = logits[asked] if len(asked) else None  # a copy, before anything changes
        penalised = np.flatnonzero(rows["penalises"])
        if len(penalised):
            logits[penalised] = self._penalised(logits[penalised], slots[penalised], rows[penalised])
        for row in np.flatnonzero(rows["biased"]):
            ids, values = self._bias[slots[row]]
            logits[row, ids] += values
        self._ban(logits, slots, rows, young, bans)
        tokens = self._draw(logits, rows, positions)
        for row, token in zip(penalised, tokens[penalised], strict=True):
            self._seen[slots[row]].output_counts[token] += 1
        return Sampled(tokens, asked, rows["num_logprobs"][asked], raw)

    def _penalised(self, logits: torch.Tensor, slots: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        seen = [self._seen[slot] for slot in slots]
        prompts, counts = torch.stack([one.prompt for one in seen]), torch.stack([one.output_counts for one in seen])
        return self._penalise(logits, prompts, counts, *(self._column(rows, name) for name in ("repetition", "presence", "frequency")))

    def _ban(self, logits: torch.Tensor, slots: np.ndarray, rows: np.ndarray, young: np.ndarray, bans: Sequence) -> None:
        """Every kind of ban is a (row, token ids); one write for all. The place for grammars."""
        banned = [
            *((row, self._stops[slots[row]]) for row in np.flatnonzero(young)),
            *((row, self._banned[slots[row]]) for row in np.flatnonzero(rows["banned"])),
            *bans,
        ]
        if banned:
            at = np.repeat([row for row, _ in banned], [len(ids) for _, ids in banned])
            logits[at, np.concatenate([np.asarray(ids, dtype=np.int64) for _, ids in banned])] = -torch.inf

    def _draw(self, logits: torch.Tensor, rows: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        if not rows["temperature"].any():
            return logits.argmax(-1)
        parameters = (self._column(rows, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed"))
        return self._sample(logits, *parameters, torch.as_tensor(positions, dtype=torch.int64, device=self._device))

    def _column(self, rows: np.ndarray, name: str) -> torch.Tensor:
        return torch.as_tensor(rows[name].copy(), device=self._device)

    def _read(self, history: np.ndarray, prompt_len: int) -> _Seen:
        prompt = torch.zeros(self._vocab_size, dtype=torch.bool)
        prompt[torch.from_numpy(history[:prompt_len].astype(np.int64))] = True
        counts = torch.bincount(torch.from_numpy(history[prompt_len:].astype(np.int64)), minlength=self._vocab_size)
        return _Seen(prompt.to(self._device), counts.to(self._device, torch.int32))


def _as_int64(seed: int) -> int:
    """Users give unsigned 64-bit seeds as well; the same bits, signed."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
