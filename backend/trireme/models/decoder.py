"""Decoder: one stage of a decoder, as the list of blocks it has with a seam before each. Families say what the blocks are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from trireme.core.batch import Attend, Batch, Items
from trireme.core.step import Regime
from trireme.layers.attention import Attention
from trireme.layers.block import Block, Build, PerRequest, PerToken
from trireme.layers.delta import GatedDeltaNet
from trireme.layers.embed import Embed, Head
from trireme.layers.linear import Linear
from trireme.layers.mlp import GatedMlp
from trireme.layers.moe import Moe
from trireme.layers.names import Names, table
from trireme.layers.param import Param
from trireme.models.mtp import Join, MtpHead, with_head
from trireme.models.walk import Walk
from trireme.parallel.deal import Deal
from trireme_kernels.delta_step.op import CapturedDeltaStep, DeltaStep
from trireme_kernels.paged_attention.op import CapturedDecode, PagedAttention

# What all families' checkpoints share.
_SHARED_NAMES = table("""
  model.embed_tokens                               -> embed
  model.layers.{i}.input_layernorm.weight          -> layers.{i}.attn.norm
  model.layers.{i}.self_attn.o_proj                -> layers.{i}.attn.out
  model.layers.{i}.post_attention_layernorm.weight -> layers.{i}.mlp.norm
  model.layers.{i}.mlp.{gate,up}_proj              -> layers.{i}.mlp.gate_up      join gate up
  model.layers.{i}.mlp.down_proj                   -> layers.{i}.mlp.down
  model.norm.weight                                -> head.norm
  lm_head                                          -> head.proj                   tie model.embed_tokens
  *.rotary_emb.inv_freq                            -> nothing
""")

DENSE_NAMES = _SHARED_NAMES + table("""
  model.layers.{i}.self_attn.{q,k,v}_proj          -> layers.{i}.attn.qkv         join q k v
""")

# Where queries and keys are normed.
QK_NORM_NAMES = table("""
  model.layers.{i}.self_attn.q_norm.weight         -> layers.{i}.attn.q_norm
  model.layers.{i}.self_attn.k_norm.weight         -> layers.{i}.attn.k_norm
""")

# Experts in both forms of checkpoint: a tensor for each, or one for all.
EXPERT_NAMES = table("""
  model.layers.{i}.mlp.gate                              -> layers.{i}.mlp.router
  model.layers.{i}.mlp.experts.{e}.{gate,up}_proj.weight -> layers.{i}.mlp.gate_up     join gate up   stack e
  model.layers.{i}.mlp.experts.{e}.down_proj.weight      -> layers.{i}.mlp.down        stack e
  model.layers.{i}.mlp.experts.gate_up_proj              -> layers.{i}.mlp.gate_up     holds gate up
  model.layers.{i}.mlp.experts.down_proj                 -> layers.{i}.mlp.down
""")

SHARED_EXPERT_NAMES = table("""
  model.layers.{i}.mlp.shared_expert.{gate,up}_proj -> layers.{i}.mlp.shared.gate_up   join gate up
  model.layers.{i}.mlp.shared_expert.down_proj      -> layers.{i}.mlp.shared.down
  model.layers.{i}.mlp.shared_expert_gate.weight    -> layers.{i}.mlp.shared.gate
""")

# Of `hybrid_blocks`. How the projections of delta layers lie is the family's to say.
HYBRID_NAMES = (
    _SHARED_NAMES
    + QK_NORM_NAMES
    + EXPERT_NAMES
    + SHARED_EXPERT_NAMES
    + table("""
  model.layers.{i}.self_attn.q_proj           -> layers.{i}.attn.qkv          join q gate k v   holds q gate   interleaved
  model.layers.{i}.self_attn.{k,v}_proj       -> layers.{i}.attn.qkv          join q gate k v
  model.layers.{i}.input_layernorm.weight     -> layers.{i}.delta.norm
  model.layers.{i}.linear_attn.conv1d.weight  -> layers.{i}.delta.conv        holds q k v
  model.layers.{i}.linear_attn.A_log          -> layers.{i}.delta.log_decay
  model.layers.{i}.linear_attn.dt_bias        -> layers.{i}.delta.dt_bias
  model.layers.{i}.linear_attn.norm.weight    -> layers.{i}.delta.out_norm
  model.layers.{i}.linear_attn.out_proj       -> layers.{i}.delta.out
  mtp.*                                       -> nothing
""")
)

LayerBlocks = Callable[[Build, int], list[Block]]


def hybrid_blocks(build: Build, layer: int) -> list[Block]:
    """Gated delta layers, and attention with a gate between them; experts or a dense MLP."""
    spec = build.spec
    return [
        GatedDeltaNet(build, layer)
        if spec.linear[layer]
        else Attention(build, layer, qkv_bias=spec.qkv_bias, o_bias=spec.o_bias, qk_norm=True, gated=True),
        Moe(build, layer) if spec.sparse[layer] else GatedMlp(build, layer),
    ]


class Computed(NamedTuple):
    """What a stage makes of a step's rows."""

    rows: torch.Tensor  # the residual, for the next stage; of the last one its columns of the float32 logits of what is sampled [S, V]
    normed: torch.Tensor | None = None  # [T, H], where a head drafts: what the last stage's own head was given of every row
    unread: torch.Tensor | None = None  # [n, H], of the last stage: the same of heads that are not sampled, for logits few at a time


class Passed(NamedTuple):
    """Rows on their way through a stage."""

    x: Iterable[torch.Tensor] | None  # what the last block gives, strip by strip
    residual: Sequence[torch.Tensor]


class Decoder(nn.Module):
    """A stage. Its parameters are empty until `weights.load` fills them."""

    def __init__(self, build: Build, names: Names, layer_blocks: LayerBlocks):
        super().__init__()
        spec, plan = build.spec, build.plan
        self.build, self.tied = build, spec.tie_word_embeddings
        names = with_head(names) if plan.mtp else names
        self.names = names.tied() if spec.tie_word_embeddings else names
        self.embed = Embed(build) if build.first else None
        blocks = [block for layer in plan.layers(build.stage) for block in layer_blocks(build, layer)]
        self.head: Head | None = None
        self.mtp: MtpHead | None = None
        if build.last:
            self.head = Head(build, tied=self.embed.weight if self.embed is not None and spec.tie_word_embeddings else None)
            blocks.append(self.head)
            self.mtp = MtpHead(build, self.head, self.embed) if plan.mtp else None
        self.blocks = nn.ModuleList(blocks)
        self._last_keeping = max(number for number, block in enumerate(blocks) if block.keeps is not None)
        self._parts: list[Embed | Join | Block] = [*([self.embed] if self.embed is not None else []), *blocks]
        self._walks = {regime: Walk(build, regime, self.embed, blocks) for regime in plan.regimes}
        if self.mtp is not None:
            self._parts += self.mtp.parts
            blocks = [*blocks, *self.mtp.blocks]

        self.keeps: list[PerToken | PerRequest] = []  # in the order of Batch.caches
        for block in blocks:
            if block.keeps is not None:
                block.cache = len(self.keeps)
                self.keeps.append(block.keeps)
        self._attends: dict[int, PagedAttention] = {block.window: block.attend for block in blocks if isinstance(block, Attention)}
        self.mixtures: list[Moe] = [block for block in blocks if isinstance(block, Moe)]  # the head's that drafts is last
        for number, map in build.maps.items():
            self.mixtures[number].placement.rewrite(map, build.map_version)
        self._steps: dict[DeltaStep, GatedDeltaNet] = {block.step: block for block in blocks if isinstance(block, GatedDeltaNet)}

    @property
    def windows(self) -> list[int]:
        """Of its attention, as Batch.attention names them."""
        return list(self._attends)

    @property
    def steps(self) -> list[DeltaStep]:
        """Ops that its states take, as Items.plans names them."""
        return list(self._steps)

    def plan_states(self, items: Items) -> None:
        """Make what Items.plans holds, once a step, ahead of the blocks that would."""
        for block in self._steps.values():
            block.planned(items)

    def plan_attention(self, query_lens: np.ndarray, kv_lens: np.ndarray, page_table: np.ndarray) -> dict[int, Attend]:
        """What `Batch.attention` holds, made once a step. query_lens, kv_lens int32 [B]: rows of each sequence in this step, and
        its keys with them; page_table int32 [B, P]."""
        plans = {window: attend.plan(query_lens, kv_lens, page_table) for window, attend in self._attends.items()}
        return {window: partial(self._attends[window].run, plan=plan) for window, plan in plans.items()}

    def capture_attention(self, batch_size: int, max_pages: int) -> dict[int, CapturedDecode] | None:
        """The same for decode steps inside a CUDA graph, by window; None where any of them cannot be captured."""
        captured = {window: attend.captured(batch_size, max_pages) for window, attend in self._attends.items()}
        made = {window: attend for window, attend in captured.items() if attend is not None}
        return made if len(made) == len(captured) else None

    def capture_states(self, num_items: int, width: int) -> dict[object, CapturedDeltaStep] | None:
        """Steps of states inside a CUDA graph, by the op, whose `run` stand in Items.plans; None where any cannot be captured. Items
        have up to `width` rows."""
        captured = {step: step.captured(num_items, width) for step in self._steps}
        made: dict[object, CapturedDeltaStep] = {step: each for step, each in captured.items() if each is not None}
        return made if len(made) == len(captured) else None

    @torch.inference_mode()
    def forward(self, batch: Batch, deal: Deal, rows: torch.Tensor | None = None) -> Computed:
        """The first stage reads batch.tokens, others take the residual `rows`, laid out as `edge` of the step's regime says, and may
        write over it: last products of many rows are added to it where it lies (see Addend). The last stage gives logits of sampled
        rows, others the residual after the add, again laid out as `edge`; the receiver norms it."""
        return self.finish(self.begin(batch, deal, rows), batch, deal)

    def begin(self, batch: Batch, deal: Deal, rows: torch.Tensor | None = None) -> Passed:
        """As far as all rows go."""
        walk = self._walks[deal.regime]
        x, residual = None, self._enter(walk, batch, deal, rows)
        for seam, block in walk.blocks[: self._num_wide(batch)]:
            normed, residual = seam(x, residual, deal)
            del x  # what the block computes may lie in its place
            x = block(normed, batch)
        return Passed(x, residual)

    def finish(self, passed: Passed, batch: Batch, deal: Deal) -> Computed:
        """The rest of forward."""
        walk, normed, (x, residual) = self._walks[deal.regime], None, passed
        del passed
        for seam, block in walk.blocks[self._num_wide(batch) :]:
            normed, residual = seam(x, residual, deal)
            del x
            if deal.heads is not None:  # nobody would read what becomes of other rows
                normed, residual, deal = walk.narrow(block, normed, residual, deal.heads)
            x = block(normed, batch)
            if self.head is not None and block is not self.head and not deal.num_rows:
                return Computed(self.head.logits(residual[0]))  # nothing is asked, and all is kept
        assert x is not None, "a stage has blocks"
        if self.head is None:
            return Computed(walk.end(x, residual, deal))
        assert normed is not None, "the head's"
        [logits] = x
        rows = normed.whole()
        if self.mtp is not None:
            rows = rows.clone()  # it reads them after an exchange of its own, by which others may write where they were gathered (see Mail)
        unread = None if batch.num_sampled is None else normed.going(rows)[batch.num_sampled :]
        return Computed(logits, None if self.mtp is None else rows, unread)

    def _num_wide(self, batch: Batch) -> int:
        """Blocks from which all rows go on. In the last stage only those whose logits are asked for go on from the last block that keeps
        something of every row; where drafts are made from all rows, or the experts of all are told, from the head."""
        if self.head is None:
            return len(self.blocks)
        if self.mtp is not None or batch.routed is not None:
            return len(self.blocks) - 1
        return self._last_keeping

    def _enter(self, walk: Walk, batch: Batch, deal: Deal, rows: torch.Tensor | None) -> Sequence[torch.Tensor]:
        """The residual at home, by strips. Apart from forward, so that nothing keeps the rows from which it is cut."""
        if self.embed is not None:
            rows = self.embed(batch)
        assert rows is not None, "a later stage takes rows"
        return walk.strips(walk.enter(rows, deal), deal)

    def inner_seams(self, deal: Deal) -> Callable[[], None]:
        """As Walk says, in the regime of the deal."""
        return self._walks[deal.regime].inner_seams(deal)

    def num_edge_rows(self, deal: Deal) -> int:
        """Rows that come over an edge to this rank."""
        return len(deal.rows(self._walks[deal.regime].edge))

    def has_whole_edges(self, regime: Regime) -> bool:
        """Whether every rank has all rows of the stage's edges, if it has any edges."""
        return not self._walks[regime].edge or (self.build.first and self.build.last)

    def schedule(self) -> list[str]:
        """Every collective of a step in each regime, a line for each block that needs any."""
        lines = []
        for regime, walk in self._walks.items():
            lines += [str(regime), *walk.lines(), *(self.mtp.lines(regime) if self.mtp is not None else ())]
        return lines

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self._parts)

    def params(self) -> Iterator[tuple[str, Param]]:
        """(name, Param) of this stage, names as on the right of the name tables; a shared Param once, at its first name."""
        seen = set()
        for part in self._parts:
            for name, param in part.named_parameters():
                assert isinstance(param, Param), f"{part.name}.{name} is not described"
                if id(param) not in seen:
                    seen.add(id(param))
                    yield f"{part.name}.{name}", param

    def multiply_any(self, num_rows: int) -> None:
        """Each product of a step's rows once, of rows that mean nothing; layers have the same ones."""
        head = None if self.head is None else self.head.proj
        products = {linear.form: linear for linear in self.modules() if isinstance(linear, Linear) and linear is not head}
        for linear in products.values():
            linear.multiply_any(num_rows)

    def sample_any(self, num_rows: int) -> None:
        """The same of rows that are sampled."""
        if self.head is not None:
            self.head.proj.multiply_any(num_rows, torch.float32)

    def prepare(self) -> None:
        """Once every parameter is filled: weights take the form in which they are multiplied."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.prepare()
