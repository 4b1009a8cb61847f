"""Stages of a checkpoint chained in this process: Decoders driven directly with Batches, no runner, no ranks, no scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from trireme.core.batch import Batch
from trireme.core.step import PAGE
from trireme.layers.block import Build
from trireme.models.decoder import Decoder
from trireme.models.registry import build_stage
from trireme.models.spec import read_spec
from trireme.parallel.plan import Plan
from trireme.weights.load import load
from trireme_kernels.choose import Choices


def build_decoder(model_dir: Path, layer_cut: Sequence[int], stage: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """An empty stage."""
    device = torch.device("cpu")
    return build_stage(Build(read_spec(model_dir), Plan(layer_cut=tuple(layer_cut)), stage, device, dtype, Choices(device, dtype)))


class Chained:
    """All stages of a checkpoint with pools of their own. Sequences are numbered; each has `num_pages` pages, scattered."""

    def __init__(self, model_dir: Path, layer_cut: Sequence[int], *, num_sequences: int = 4, max_len: int = 256):
        self.decoders = [build_decoder(model_dir, layer_cut, stage) for stage in range(len(layer_cut))]
        for decoder in self.decoders:
            load(decoder, model_dir)
        num_pages = -(-max_len // PAGE)
        shuffled = np.random.default_rng(0).permutation(num_sequences * num_pages).astype(np.int32)
        self._page_table = shuffled.reshape(num_sequences, num_pages)
        device = torch.device("cpu")
        self._caches = [[keeps.allocate(shuffled.size, device) for keeps in decoder.keeps] for decoder in self.decoders]
        self._lens = [0] * num_sequences

    def forward(self, new: dict[int, Sequence[int]], *, all_rows: bool = True) -> torch.Tensor:
        """One step: tokens that each sequence gets. Logits [rows, V] of all of them in order, or of each one's last."""
        query_lens = np.array([len(tokens) for tokens in new.values()], dtype=np.int32)
        starts = np.array([self._lens[sequence] for sequence in new], dtype=np.int32)
        for sequence, tokens in new.items():
            self._lens[sequence] += len(tokens)
        tables = self._page_table[list(new)]
        positions = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, query_lens, strict=True)])
        owners = np.repeat(np.arange(len(new)), query_lens)
        pages = tables[owners, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
        head_rows = np.arange(len(positions)) if all_rows else np.cumsum(query_lens) - 1

        rows = None
        for decoder, caches in zip(self.decoders, self._caches, strict=True):
            batch = Batch(
                num_rows=len(positions),
                tokens=torch.tensor([token for tokens in new.values() for token in tokens]),
                positions=torch.from_numpy(positions),
                pages=torch.from_numpy(pages),
                attention=decoder.plan_attention(query_lens, starts + query_lens, tables),
                caches=caches,
                head_rows=torch.from_numpy(head_rows),
            )
            rows = decoder.forward(batch, rows)
        return rows

    def greedy(self, prompt: Sequence[int], max_tokens: int, sequence: int = 0) -> list[int]:
        """The prompt in one step, then token by token."""
        answer, new = [], list(prompt)
        while len(answer) < max_tokens:
            token = int(self.forward({sequence: new}, all_rows=False).argmax())
            answer.append(token)
            new = [token]
        return answer
