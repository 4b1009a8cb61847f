"""Block: a part of a model between two seams, what it keeps, and the Build that constructors get."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import nn

from trireme.core.batch import Batch
from trireme.core.step import PAGE, Regime
from trireme.layers.param import Param
from trireme.layers.rope import cos_sin
from trireme.models.spec import Spec
from trireme.parallel.collectives import Collectives
from trireme.parallel.layout import Layout, lay
from trireme.parallel.mail import Mailbox
from trireme.parallel.mesh import Mesh
from trireme.parallel.plan import Plan
from trireme.parallel.seam import Addend
from trireme.parallel.strips import Strips
from trireme_kernels.choose import Choices


@dataclass(frozen=True)
class Build:
    """All that a constructor may know: the checkpoint, the machines, this rank's place, and where numbers live."""

    spec: Spec
    plan: Plan
    stage: int
    device: torch.device
    dtype: torch.dtype
    choices: Choices  # ops, chosen once
    rank: int = 0  # inside the stage
    maps: Mapping[int, np.ndarray] = field(default_factory=dict)  # of experts, where not trivial, by number as in Decoder.mixtures
    map_version: int = 0  # of the stage, that brought them

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.plan.pp - 1

    @cached_property
    def collectives(self) -> Collectives:
        """This rank's groups in its stage; each epoch fills them anew."""
        plan = self.plan
        if self.device.type != "cuda" or plan.ranks == 1:
            return Collectives(Mesh(plan), self.rank, self.device)
        return Collectives(Mesh(plan), self.rank, self.device, self.choices("peer_sum", hidden=self.spec.hidden), self.mailbox)

    @cached_property
    def mailbox(self) -> Mailbox | None:
        """Of a GPU, where steps have rows for mail."""
        plan, num_slots = self.plan, self.plan.mail_strips
        if not num_slots:
            return None
        return Mailbox(self.rank % plan.tp, plan.tp, plan.strip_rows, self.spec.hidden, self.dtype, self.device, num_slots=num_slots)

    @cached_property
    def cos_sin(self) -> torch.Tensor:
        """The rotary table of every position that a sequence may reach, float32 [max_position_embeddings, R], R the numbers of a
        head that turn."""
        return cos_sin(self.spec.rope, self.spec.rotary_dim or self.spec.head_dim, self.spec.max_position_embeddings).to(self.device)

    def place(self, axis: str) -> tuple[int, int]:
        """(this rank's number along an axis of the mesh, the axis's size)."""
        span = self.collectives.mesh.spans[axis]
        return span.place(self.rank), span.size

    def share(self, num_units: int, axis: str = "tp") -> int:
        """How many of num_units heads this rank has; at least a copy of one."""
        return max(1, num_units // self.place(axis)[1])


@dataclass(frozen=True)
class PerToken:
    """A block keeps a key and a value of each token, in pages of PAGE tokens."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_page(self) -> int:
        return 2 * self.num_kv_heads * PAGE * self.head_dim * self.dtype.itemsize

    def allocate(self, num_pages: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values), each [num_pages, num_kv_heads, PAGE, head_dim]. On a CPU heads are outermost in memory, so that
        one head's pages gather as whole runs."""
        shape = (num_pages, self.num_kv_heads, PAGE, self.head_dim)
        if device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=device), torch.zeros(shape, dtype=self.dtype, device=device)
        outermost = (self.num_kv_heads, num_pages, PAGE, self.head_dim)
        keys, values = (torch.zeros(outermost, dtype=self.dtype).permute(1, 0, 2, 3) for _ in range(2))
        return keys, values


@dataclass(frozen=True)
class PerRequest:
    """A block keeps states of each request: the last inputs of a causal convolution, a matrix for each head of a recurrence, and
    the inputs of rows that may not stand (see core.batch.Items). Rows of the first two are slots, then snapshots."""

    window: int  # rows of the convolution's inputs
    channels: int  # of the convolution, this rank's
    num_heads: int  # of the recurrence, this rank's
    key_dim: int
    value_dim: int
    held: int  # numbers of a row that may be replayed
    dtype: torch.dtype  # of inputs; the recurrence is float32

    @property
    def bytes_per_state(self) -> int:
        """Of a slot or a snapshot, without what is held."""
        return self.window * self.channels * self.dtype.itemsize + 4 * self.num_heads * self.key_dim * self.value_dim

    def bytes_held(self, num_rows: int) -> int:
        """Of a slot that may hold so many rows."""
        return num_rows * self.held * self.dtype.itemsize

    def allocate(self, num_slots: int, num_snapshots: int, num_rows: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """(inputs [S, window, channels], states float32 [S, num_heads, key_dim, value_dim], held [num_slots, num_rows, held]),
        S = num_slots + num_snapshots."""
        num_states = num_slots + num_snapshots
        return (
            torch.zeros(num_states, self.window, self.channels, dtype=self.dtype, device=device),
            torch.zeros(num_states, self.num_heads, self.key_dim, self.value_dim, device=device),
            torch.zeros(num_slots, num_rows, self.held, dtype=self.dtype, device=device),
        )


class Block(nn.Module):
    """Takes normed rows [N, H] laid out as `takes`, gives rows [N, H] laid out as `gives`, strip by strip; `norm` is the seam's
    before it. What it gives of a strip is computed when it is asked for."""

    takes: Layout = lay()
    gives: Layout = lay()
    norm: Param  # [H]
    keeps: PerToken | PerRequest | None = None
    cache: int = -1  # its number among the stage's blocks that keep something: its place in Batch.caches

    def __init__(self, name: str):
        super().__init__()
        self.name = name  # "layers.3.attn": the name tables' right side begins with it

    def within(self, regime: Regime) -> tuple[str, ...]:
        """Collectives that it has made between its seams, by objects that it was given."""
        return ()

    def forward(self, x: Strips, batch: Batch) -> Iterable[torch.Tensor | Addend]:
        raise NotImplementedError
