"""Logprobs of tokens among their alternatives, from raw logits: what users read, not what sampling uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from trireme.core.request import Logprobs
from trireme.core.step import Open, PromptLogprobs, array
from trireme.parallel.vocabulary import CutLogits
from trireme.ranks.rows import Rows
from trireme.ranks.staging import download, upload

CHUNK = 64  # rows at once: bounds logits, and what is computed of them, to chunk * vocabulary * 4 bytes each


class Described:
    """What was computed of n tokens, on its way to the host. All ranks make it, or none."""

    def __init__(self, logits: Callable[[slice], CutLogits], tokens: torch.Tensor, num_top: np.ndarray):
        """`logits`: of some of n rows; `tokens`: int64 [n]; `num_top`: int [n], alternatives to list in each row."""
        self._num_top = num_top.tolist()
        chunks = [slice(start, start + CHUNK) for start in range(0, len(tokens), CHUNK)]
        self._columns = [_describe(logits(rows), tokens[rows], int(num_top[rows].max())) for rows in chunks]

    def read(self) -> list[Logprobs]:
        """One for each token, once the device has come so far."""
        rows = [row for columns in self._columns for row in zip(*(column.tolist() for column in columns), strict=True)]
        return [
            Logprobs(token, value, rank, ids[:wanted], id_values[:wanted])
            for (token, value, rank, ids, id_values), wanted in zip(rows, self._num_top, strict=True)
        ]


def _describe(logits: CutLogits, tokens: torch.Tensor, num_top: int) -> tuple[torch.Tensor, ...]:
    chosen, mass = logits.at(tokens), logits.logsumexp()
    ranks = logits.num_above(chosen) + 1
    top, top_ids = logits.topk(num_top)
    return tuple(map(download, (tokens, chosen - mass, ranks, top_ids, top - mass[:, None])))


@dataclass(frozen=True)
class Stretch:
    """Rows of one step whose logits tell the logprobs of prompt tokens."""

    slot: int
    start: int  # position of the first row; it tells of token start + 1
    rows: np.ndarray  # int64 [r]
    tokens: np.ndarray  # int64 [r]: the prompt's own next tokens
    num_top: int

    def describe(self, normed: torch.Tensor, head: Callable[[torch.Tensor], CutLogits]) -> Described:
        """`normed` [r, H]: what the head reads of these rows. It multiplies few at a time: nobody set memory aside for more."""
        [tokens] = upload([self.tokens], normed.device)
        return Described(lambda some: head(normed[some]), tokens, np.full(len(tokens), self.num_top))

    def tell(self, described: Described) -> PromptLogprobs:
        return PromptLogprobs(self.slot, self.start, described.read())


class Prompts:
    """Prompts of the slots whose sequences asked for prompt logprobs."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[np.ndarray, int]] = {}  # prompt int64 [prompt_len], alternatives to list

    def clear(self) -> None:
        self._asked.clear()

    def open(self, opened: Open) -> None:
        self._asked.pop(opened.slot, None)
        if opened.sampling.prompt_logprobs is not None:
            self._asked[opened.slot] = (array(opened.history)[: opened.prompt_len].astype(np.int64), opened.sampling.prompt_logprobs)

    def stretches(self, rows: Rows) -> list[Stretch]:
        """What a step tells of them: all of its rows but that of a prompt's last token, and none of outputs."""
        if not self._asked:
            return []
        found: list[Stretch] = []
        for item in np.flatnonzero(np.isin(rows.slots, list(self._asked))):
            slot, start = int(rows.slots[item]), int(rows.starts[item])
            prompt, num_top = self._asked[slot]
            tokens = prompt[start + 1 : rows.ends[item] + 1]
            if len(tokens):
                found.append(Stretch(slot, start, rows.firsts[item] + np.arange(len(tokens)), tokens, num_top))
        return found
