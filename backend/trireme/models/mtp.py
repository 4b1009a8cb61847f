"""MtpHead: the head that drafts (multi-token prediction), a small stage of its own behind the last one. Which rows it passes over,
and what becomes of its drafts, is ranks/drafter's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from trireme.core.batch import Batch
from trireme.core.refusal import Refusal
from trireme.core.step import Regime
from trireme.layers.attention import Attention
from trireme.layers.block import Block, Build
from trireme.layers.embed import Embed, Head
from trireme.layers.linear import Linear
from trireme.layers.mlp import GatedMlp
from trireme.layers.moe import Moe
from trireme.layers.names import Names, table
from trireme.layers.param import norm_weight
from trireme.models.walk import Walk
from trireme.parallel.deal import Deal
from trireme.parallel.layout import WHOLE, home_of, lay
from trireme.parallel.seam import Route
from trireme.parallel.strips import Strips

# The embedding is the model's: a stage that has none reads it once more.
_NAMES = table("""
  model.embed_tokens               -> mtp.embed
  mtp.fc                           -> mtp.fc
  mtp.pre_fc_norm_embedding.weight -> mtp.token_norm
  mtp.pre_fc_norm_hidden.weight    -> mtp.row_norm
  mtp.norm.weight                  -> mtp.out.norm
""").nested("model.", "model.language_model.")


def with_head(family: Names) -> Names:
    """A family's table, which passes the head over, as one that knows it: its layer is named as the model's are."""
    rules = [rule for rule in family.rules if not rule.pattern.startswith("mtp.")]
    layers = [rule for rule in rules if rule.pattern.startswith("model.layers.")]
    rules += [replace(rule, pattern=rule.pattern.replace("model.", "mtp.", 1), target=f"mtp.{rule.target}") for rule in layers]
    return Names(tuple(rules)) + _NAMES


class MtpHead(nn.Module):
    """What comes after a row's next token t, from t and the row h of the token before, as the decoder's last norm gives it:

        t --embed--> norm \\
                            fc --> attention --> MLP or experts --> norm = the head's row --> logits of the decoder's head
        h ---------> norm /

    The row stands where h stood: its key and value are kept at h's position. A chain goes on from the head's own row, as h.
    """

    def __init__(self, build: Build, head: Head, embed: Embed | None):
        """`embed`: the stage's, if it has one."""
        super().__init__()
        spec = build.spec
        if spec.num_mtp_layers > 1:
            raise Refusal(
                f"the checkpoint's head that drafts has {spec.num_mtp_layers} layers",
                why="here it is one layer, that drafts token after token",
                fix='set mtp to {"num_tokens": 0}',
            )
        self.embed = embed or Embed(build, "mtp.embed", tied=head.proj.weight if spec.tie_word_embeddings else None)
        self.join = Join(build)
        self.attention = Attention(build, 0, qkv_bias=spec.qkv_bias, o_bias=spec.o_bias, qk_norm=spec.qk_norm, gated=spec.gated_attention)
        self.mlp = Moe(build, 0) if spec.sparse[-1] else GatedMlp(build, 0)  # as the last layer
        self.out = Out(build)
        for block in (self.attention, self.mlp):
            block.name = f"mtp.{block.name}"
        self.blocks: list[Block] = [self.attention, self.mlp, self.out]
        self.parts: list[Embed | Join | Block] = [*([self.embed] if embed is None else []), self.join, *self.blocks]
        self._head = head
        self._walks = {regime: Walk(build, regime, self.embed, self.blocks) for regime in build.plan.regimes}
        self._home = {regime: Route(Out.takes, home_of(regime), build.collectives) for regime in build.plan.regimes}

    def forward(self, normed: torch.Tensor, batch: Batch, deal: Deal) -> torch.Tensor:
        """The decoder's rows [T, H] of a step -> the head's [T, H]; batch.tokens are the next ones. All ranks have all rows."""
        x, residual = None, self._enter(normed, batch, deal)
        for seam, block in self._walks[deal.regime].blocks:
            taken, residual = seam(x, residual, deal)
            x = block(taken, batch)
        assert x is not None, "a head has blocks"
        [rows] = x
        return rows

    def keep(self, normed: torch.Tensor, batch: Batch, deal: Deal) -> None:
        """Only keys and values, for rows from which nothing is drafted; batch.attention is not read."""
        seam, _ = self._walks[deal.regime].blocks[0]
        x, _ = seam(None, self._enter(normed, batch, deal), deal)
        self.attention.write(x, batch)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The head's rows [R, H] -> float32 logits, a rank's columns of them, as models.decoder gives them."""
        return self._head.logits(rows)

    def lines(self, regime: Regime) -> Iterator[str]:
        """Collectives of `forward`, as Walk says them."""
        yield from self._walks[regime].lines("mtp.enter")

    def _enter(self, normed: torch.Tensor, batch: Batch, deal: Deal) -> Sequence[torch.Tensor]:
        """The residual at home, by strips."""
        walk = self._walks[deal.regime]
        embedded = walk.enter(self.embed(batch), deal)
        return walk.strips(self.join(embedded, self._home[deal.regime](normed, deal)), deal)


class Join(nn.Module):
    """Embedded tokens and rows, [N, H] both -> [N, H]. No rank shares its weight: that would cost a collective more."""

    def __init__(self, build: Build):
        super().__init__()
        hidden = build.spec.hidden
        self.name = "mtp"
        self.token_norm, self.row_norm = norm_weight(build, hidden), norm_weight(build, hidden)
        self.fc = Linear(build, hidden, 2 * hidden)
        self._rms_norm, self._eps = build.choices("rms_norm", hidden=hidden), build.spec.eps

    def forward(self, embedded: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        tokens = self._rms_norm(embedded, self.token_norm, self._eps)
        return self.fc(torch.cat((tokens, self._rms_norm(rows, self.row_norm, self._eps)), dim=-1))


class Out(Block):
    """Rows as its norm leaves them, on every rank."""

    takes = lay(tp=WHOLE, cp=WHOLE)

    def __init__(self, build: Build):
        super().__init__("mtp.out")
        self.norm = norm_weight(build, build.spec.hidden)

    def forward(self, x: Strips, batch: Batch) -> Sequence[torch.Tensor]:
        return [x.whole()]
