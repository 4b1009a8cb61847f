"""Decoder: one stage of a dense decoder, as the list of blocks it has with a seam before each. Families say what the blocks are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from trireme.core.batch import Batch
from trireme.layers.attention import Attention
from trireme.layers.block import Block, Build, PerToken
from trireme.layers.embed import Embed, Head
from trireme.layers.linear import Linear
from trireme.layers.names import Names, table
from trireme.layers.param import Param
from trireme.parallel.layout import Layout
from trireme.parallel.seam import Route, Seam, home_of

# What the dense families' checkpoints share.
DENSE_NAMES = table("""
  model.embed_tokens                               -> embed
  model.layers.{i}.input_layernorm.weight          -> layers.{i}.attn.norm
  model.layers.{i}.self_attn.{q,k,v}_proj          -> layers.{i}.attn.qkv         join q k v
  model.layers.{i}.self_attn.o_proj                -> layers.{i}.attn.out
  model.layers.{i}.post_attention_layernorm.weight -> layers.{i}.mlp.norm
  model.layers.{i}.mlp.{gate,up}_proj              -> layers.{i}.mlp.gate_up      join gate up
  model.layers.{i}.mlp.down_proj                   -> layers.{i}.mlp.down
  model.norm.weight                                -> head.norm
  lm_head                                          -> head.proj                   tie model.embed_tokens
  *.rotary_emb.inv_freq                            -> nothing
""")

LayerBlocks = Callable[[Build, int], list[Block]]


class Decoder(nn.Module):
    """A stage. Its parameters are empty until `weights.load` fills them."""

    def __init__(self, build: Build, names: Names, layer_blocks: LayerBlocks):
        super().__init__()
        spec, plan = build.spec, build.plan
        self.build, self.tied = build, spec.tie_word_embeddings
        self.names = names.tied() if spec.tie_word_embeddings else names
        self.embed = Embed(build) if build.first else None
        blocks = [block for layer in plan.layers(build.stage) for block in layer_blocks(build, layer)]
        if build.last:
            blocks.append(Head(build, tied=self.embed.weight if self.embed is not None and spec.tie_word_embeddings else None))
        self.blocks = nn.ModuleList(blocks)
        self._parts: list[Embed | Block] = [self.embed, *blocks] if self.embed is not None else [*blocks]

        home = home_of(plan)
        self._enter = Route(self.embed.gives, home, plan, build.collective) if self.embed is not None else None
        self._leave = None if build.last else Route(blocks[-1].gives, home, plan, build.collective)
        have = [home, *(block.gives for block in blocks)]
        self._walk = [(_seam(build, before, block), block) for before, block in zip(have, blocks, strict=False)]

        self.keeps: list[PerToken] = []  # in the order of Batch.caches
        for block in blocks:
            if block.keeps is not None:
                block.cache = len(self.keeps)
                self.keeps.append(block.keeps)
        self._attends = {block.window: block.attend for block in blocks if isinstance(block, Attention)}

    def plan_attention(self, query_lens: np.ndarray, kv_lens: np.ndarray, page_table: torch.Tensor | np.ndarray) -> Any:
        """What `Batch.attention` holds, made once a step: a plan for each distinct window. query_lens, kv_lens int32 [B]: rows
        of each sequence in this step, and its keys with them; page_table int32 [B, P]."""
        return {window: attend.plan(query_lens, kv_lens, page_table) for window, attend in self._attends.items()}

    @torch.inference_mode()
    def forward(self, batch: Batch, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The first stage reads batch.tokens, others take the residual `rows` [T, H]. The last stage gives float32 logits
        [R, V] of batch.head_rows, others the residual [T, H] after the add; the receiver norms it."""
        if rows is None:
            assert self.embed is not None and self._enter is not None, "a later stage takes rows"
            rows = self._enter(self.embed(batch))
        x, residual = None, rows
        for seam, block in self._walk:
            x, residual = seam(x, residual)
            x = block(x, batch)
        assert x is not None, "a stage has blocks"
        return x if self._leave is None else residual + self._leave(x)

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

    def prepare(self) -> None:
        """Once every parameter is filled: weights take the form in which they are multiplied."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.prepare()


def _seam(build: Build, have: Layout, block: Block) -> Seam:
    hidden = build.spec.hidden
    return Seam(
        have,
        block.takes,
        build.plan,
        weight=block.norm,
        eps=build.spec.eps,
        rms_norm=build.choices("rms_norm", hidden=hidden),
        add_rms_norm=build.choices("add_rms_norm", hidden=hidden),
        collective=build.collective,
    )
