"""Sorting: every tensor of a checkpoint to a parameter of this stage, to another stage, or nowhere by the family's table.
The table's language is layers/names; nothing is read here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from trireme.core.refusal import Refusal
from trireme.layers.names import NOTHING, Match
from trireme.layers.param import Param
from trireme.models.decoder import Decoder
from trireme.weights.reader import Stored


class Use(NamedTuple):
    """A checkpoint tensor fills parts of a parameter, of one expert or of all that it has."""

    tensor: str
    target: str
    parts: tuple[int, ...]
    expert: int | None
    interleaved: bool


@dataclass(frozen=True)
class Sorting:
    """Each tensor is in exactly one of `used`, `elsewhere` and `dropped`."""

    uses: tuple[Use, ...]
    elsewhere: tuple[str, ...]  # other stages', and of experts that other ranks have
    dropped: tuple[str, ...]  # the table says `nothing`
    twins: tuple[tuple[str, str], ...]  # dropped tensors, and what each must equal

    @property
    def used(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(use.tensor for use in self.uses))


def sort(tensors: Mapping[str, Stored], decoder: Decoder, num_layers: int) -> Sorting:
    """Refusal, with names, where a tensor is left over, a part of a parameter is missing or filled twice, or a shape differs."""
    params, blocks = dict(decoder.params()), decoder.block_names
    uses: list[Use] = []
    elsewhere, dropped, twins, left_over = [], [], [], []
    for name in tensors:
        matches = decoder.names.find(name)
        here = [Use(name, match.target, match.parts, match.expert, match.interleaved) for match in matches if _is_here(match, params)]
        uses += here
        if here:
            continue
        if any(_is_elsewhere(match, params, blocks, num_layers) for match in matches):
            elsewhere.append(name)
        elif any(match.target == NOTHING for match in matches):
            dropped.append(name)
            twins += [(name, twin) for match in matches for twin in match.twins if twin in tensors]
        else:
            left_over.append(name)
    _refuse_left_over(left_over)
    _refuse_unfilled(uses, params)
    _refuse_misshapen(uses, params, tensors)
    return Sorting(tuple(uses), tuple(elsewhere), tuple(dropped), tuple(twins))


def _is_here(match: Match, params: Mapping[str, Param]) -> bool:
    param = params.get(match.target)
    return param is not None and (match.expert is None or match.expert in (param.experts or ()))


def _is_elsewhere(match: Match, params: Mapping[str, Param], blocks: tuple[str, ...], num_layers: int) -> bool:
    """Whether another rank or another stage has it. A tensor of a layer that is here, but of no parameter, is nobody's; so is
    one of a layer or an expert beyond the model's."""
    if match.target == NOTHING or (match.layer is not None and match.layer >= num_layers):
        return False
    if match.target in params:
        return match.expert is not None and match.expert < params[match.target].whole[0]
    part, number, _ = match.target.partition("." if match.layer is None else f"layers.{match.layer}")
    near = part if match.layer is None else part + number  # "head", "layers.3", "mtp.layers.0"
    return not any(f"{block}.".startswith(f"{near}.") for block in blocks)


def _refuse_left_over(names: list[str]) -> None:
    if names:
        raise Refusal(
            f"the checkpoint has tensors that this model does not use: {_few(names)}",
            why="a model that leaves weights out is another model",
            fix="check that config.json belongs to these weights, or name the tensors in the family's table",
        )


def _refuse_unfilled(uses: list[Use], params: Mapping[str, Param]) -> None:
    wanted = {(name, cell) for name, param in params.items() for cell in param.cells()}
    filled = Counter((use.target, cell) for use in uses for cell in params[use.target].cells(use.parts, use.expert))
    missing = sorted({name for name, _ in wanted - set(filled)})
    twice = sorted({name for (name, _), times in filled.items() if times > 1})
    if missing or twice:
        raise Refusal(
            f"the checkpoint fills parameters {'twice' if twice else 'not at all, or in part'}: {_few(twice or missing)}",
            why="every parameter is filled once",
            fix="fetch the checkpoint again, and check that config.json belongs to these weights",
        )


def _refuse_misshapen(uses: list[Use], params: Mapping[str, Param], tensors: Mapping[str, Stored]) -> None:
    for use in uses:
        shape, wanted = tensors[use.tensor].shape, params[use.target].tensor_shape(use.parts, use.expert)
        if shape != wanted:
            raise Refusal(
                f"{use.tensor} is {list(shape)}, but config.json makes it {list(wanted)}",
                why="the weights and the config are not of one model",
                fix="check that config.json belongs to these weights",
            )


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
