"""The name-table language: which checkpoint tensor becomes which parameter. Reading and cutting are weights' work.

    model.layers.{i}.self_attn.{q,k,v}_proj                   -> layers.{i}.attn.qkv      join q k v
    model.layers.{i}.mlp.experts.{e}.{gate,up}_proj.weight    -> layers.{i}.mlp.gate_up   join gate up   stack e
    model.layers.{i}.mlp.experts.gate_up_proj                 -> layers.{i}.mlp.gate_up   holds gate up
    model.layers.{i}.linear_attn.in_proj_ba                   -> layers.{i}.delta.proj    join q k v z b a   holds b a   interleaved
    lm_head                                                   -> head.proj                tie model.embed_tokens
    *.rotary_emb.inv_freq                                     -> nothing

A line is `pattern -> target`, and a pattern names a tensor, or a module whose `.weight` and `.bias` follow it to the target.
`{i}` is a layer's number, `{e}` an expert's, `{a,b}` one of several words, `*` anything. What may follow the target:

join a b    the parameter's parts, in the order in which their rows stand in it; the tensor is the one that is the pattern's word
holds a b   the tensor has these parts already, in that order; without `join` they are all that there are
interleaved their units (heads) alternate in the tensor: the first unit of each part, then the second of each, and so on
stack e     each expert has a tensor, which fills its place along the parameter's first dim
tie m       the module whose tensors are read instead from checkpoints with tied embeddings; should such a checkpoint have
            this one all the same, they must be equal. Of several names it has the one that the checkpoint has

`nothing` passes a tensor over: it is computed here, or not needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

NOTHING = "nothing"
_CLAUSES = ("join", "holds", "interleaved", "stack", "tie")


class Match(NamedTuple):
    """Where a checkpoint tensor goes: `target` is a parameter's name, or NOTHING; `layer` is None outside of layers."""

    target: str
    parts: tuple[int, ...] = (0,)  # of the parameter, that the tensor has
    expert: int | None = None  # whose tensor it is; None: of all, or of none
    layer: int | None = None
    twins: tuple[str, ...] = ()  # with NOTHING: the tensor that it must equal, by each name that it may have
    interleaved: bool = False  # units of the parts alternate


@dataclass(frozen=True)
class Rule:
    """One line of a table: `clauses` are what follows its target, each with its words."""

    pattern: str
    target: str
    clauses: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def ties(self) -> tuple[str, ...]:
        return self.clauses.get("tie", ())

    def match(self, name: str) -> Match | None:
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        groups = found.groupdict()
        if self.target == NOTHING:
            return Match(NOTHING, twins=tuple(tie + (groups["leaf"] or "") for tie in self.ties))
        layer, expert = groups.get("i"), groups.get("e")
        return Match(
            target=self.target.replace("{i}", layer or "") + (groups["leaf"] or ""),
            parts=self._parts(groups.get("word")),
            expert=int(expert) if expert is not None else None,
            layer=int(layer) if layer is not None else None,
            interleaved="interleaved" in self.clauses,
        )

    def _parts(self, word: str | None) -> tuple[int, ...]:
        held = self.clauses.get("holds", ())
        every = self.clauses.get("join", held)
        if held:
            return tuple(every.index(part) for part in held)
        return (every.index(word),) if every and word is not None else (0,)

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        pieces = []
        for piece in re.split(r"(\{[^}]*\}|\*)", self.pattern):
            if piece == "*":
                pieces.append(".*")
            elif piece in ("{i}", "{e}"):
                pieces.append(rf"(?P<{piece[1]}>\d+)")
            elif piece.startswith("{"):
                pieces.append(f"(?P<word>{'|'.join(map(re.escape, piece[1:-1].split(',')))})")
            else:
                pieces.append(re.escape(piece))
        return re.compile("".join(pieces) + r"(?P<leaf>\.weight|\.bias)?")


@dataclass(frozen=True)
class Names:
    """A family's table."""

    rules: tuple[Rule, ...]

    def __add__(self, other: Names) -> Names:
        return Names(self.rules + other.rules)

    def nested(self, prefix: str, inside: str) -> Names:
        """The table of checkpoints of the model alone, and of those that have it inside a larger one: their names begin with
        `inside` where its own begin with `prefix`."""
        rules = []
        for rule in self.rules:
            ties = tuple(name for tie in rule.ties for name in (tie, tie.replace(prefix, inside, 1)))
            rules.append(replace(rule, clauses={**rule.clauses, "tie": ties}) if ties else rule)
            if rule.pattern.startswith(prefix):
                rules.append(replace(rule, pattern=rule.pattern.replace(prefix, inside, 1)))
        return Names(tuple(rules))

    def tied(self) -> Names:
        """The table of a checkpoint whose embeddings are tied: what `tie` names feeds both targets."""
        rules = []
        for rule in self.rules:
            rules.append(Rule(rule.pattern, NOTHING, rule.clauses) if rule.ties else rule)
            rules += [Rule(tie, rule.target) for tie in rule.ties]
        return Names(tuple(rules))

    def find(self, name: str) -> list[Match]:
        """Every place that a checkpoint tensor goes; empty where no line knows it."""
        return [match for rule in self.rules if (match := rule.match(name)) is not None]


def table(text: str) -> Names:
    """A table from its lines."""
    return Names(tuple(_parse(line) for line in text.strip().splitlines() if line.strip()))


def _parse(line: str) -> Rule:
    pattern, arrow, target, *rest = line.split()
    assert arrow == "->" and (not rest or rest[0] in _CLAUSES), f"not a line of a name table: {line!r}"
    clauses: dict[str, tuple[str, ...]] = {}
    for word in rest:
        if word in _CLAUSES:
            clauses[word] = ()
        else:
            clauses[list(clauses)[-1]] += (word,)
    assert ("stack" in clauses) == ("{e}" in pattern), f"{{e}} and `stack e` go together: {line!r}"
    return Rule(pattern, target, clauses)
