"""The name-table language: which checkpoint tensor becomes which parameter. Reading and cutting are weights' work.

    model.layers.{i}.self_attn.{q,k,v}_proj -> layers.{i}.attn.qkv    join q k v
    lm_head                                 -> head.proj              tie model.embed_tokens
    *.rotary_emb.inv_freq                   -> nothing

A line is `pattern -> target`, and a pattern names a tensor, or a module whose `.weight` and `.bias` follow it to the target.
`{i}` is a layer's number, `{a,b}` one of several words, `*` anything. `join` lists the words in the order in which their
rows stand in the parameter. `tie` names the module whose tensors are read in its place from checkpoints with tied
embeddings; should such a checkpoint have its own all the same, they must be equal. `nothing` passes a tensor over: it is
computed here, or not needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

NOTHING = "nothing"


class Match(NamedTuple):
    """Where a checkpoint tensor goes: `target` is a parameter's name, or NOTHING; `layer` is None outside of layers."""

    target: str
    part: int = 0
    layer: int | None = None
    twin: str | None = None  # with NOTHING: the tensor that it must equal


@dataclass(frozen=True)
class Rule:
    """One line of a table."""

    pattern: str
    target: str
    parts: tuple[str, ...] = ()
    tie: str | None = None

    def match(self, name: str) -> Match | None:
        found = re.fullmatch(_regex(self.pattern), name)
        if found is None:
            return None
        groups = found.groupdict()
        if self.target == NOTHING:
            return Match(NOTHING, twin=self.tie and self.tie + (groups["leaf"] or ""))
        layer = groups.get("i")
        return Match(
            target=self.target.replace("{i}", layer or "") + (groups["leaf"] or ""),
            part=self.parts.index(groups["word"]) if self.parts else 0,
            layer=int(layer) if layer is not None else None,
        )


@dataclass(frozen=True)
class Names:
    """A family's table."""

    rules: tuple[Rule, ...]

    def __add__(self, other: Names) -> Names:
        return Names(self.rules + other.rules)

    def tied(self) -> Names:
        """The table of a checkpoint whose embeddings are tied: what `tie` names feeds both targets."""
        rules = []
        for rule in self.rules:
            rules.append(rule if rule.tie is None else Rule(rule.pattern, NOTHING, tie=rule.tie))
            if rule.tie is not None:
                rules.append(Rule(rule.tie, rule.target))
        return Names(tuple(rules))

    def find(self, name: str) -> list[Match]:
        """Every place that a checkpoint tensor goes; empty where no line knows it."""
        return [match for rule in self.rules if (match := rule.match(name)) is not None]


def table(text: str) -> Names:
    """A table from its lines."""
    return Names(tuple(_parse(line) for line in text.strip().splitlines() if line.strip()))


def _parse(line: str) -> Rule:
    pattern, arrow, target, *rest = line.split()
    assert arrow == "->" and rest[:1] in ([], ["join"], ["tie"]), f"not a line of a name table: {line!r}"
    return Rule(
        pattern,
        target,
        parts=tuple(rest[1:]) if rest[:1] == ["join"] else (),
        tie=rest[1] if rest[:1] == ["tie"] else None,
    )


def _regex(pattern: str) -> str:
    pieces = []
    for piece in re.split(r"(\{[^}]*\}|\*)", pattern):
        if piece == "*":
            pieces.append(".*")
        elif piece == "{i}":
            pieces.append(r"(?P<i>\d+)")
        elif piece.startswith("{"):
            pieces.append(f"(?P<word>{'|'.join(map(re.escape, piece[1:-1].split(',')))})")
        else:
            pieces.append(re.escape(piece))
    return "".join(pieces) + r"(?P<leaf>\.weight|\.bias)?"
