"""The grid of parallel plans that tests/plans runs: plans as words, the checkpoints that they need, and which of them are few
enough for every `make test`."""

from __future__ import annotations

from typing import Any

from trireme.models.planner import SETTINGS

DENSE, MOE = ("llama", "qwen2", "qwen3"), ("qwen2_moe", "qwen3_moe")
HYBRID, HYBRID_MOE = ("qwen3_5",), ("qwen3_5_moe", "qwen3_next")

# Odd on purpose: 12 heads of which 6 share one key/value head, a vocabulary that nothing divides, four layers of 88 columns.
SIZES = {"num_attention_heads": 12, "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 251}
# Eight ranks may share an expert's columns, but not those of the shared one (36): that is whole on each of them.
_EXPERTS = {"moe_intermediate_size": 24}
# For four ranks: a state for each value head, which are shared with the key head that two of them have.
_DELTA = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
# For three ranks: 3 key/value heads.
_THIRDS = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 90}

FOR_ALL = [
    "tp2",
    "tp4",
    "tp2 sp",
    "tp4 sp",
    "cp2",
    "cp4",
    "tp2 cp2",
    "tp2 cp2 sp",
    "tp4 cp2 sp",
    "pp2 tp2",
    "pp2 tp2 sp",
    "pp2 tp4 sp",
    "pp2 cp2",
    "pp2 cp4",
    "pp2 tp2 cp2 sp",
    "pp2 tp2 cp2 sp tensor",
    "pp4 tp2 sp",
    "tp2 few",
    "pp2 cp2 few",
]
FOR_EXPERTS = [
    "tp2 ep2",
    "tp4 ep4",
    "tp4 ep2",
    "tp4 ep2 sp",
    "cp2 ep2",
    "cp2 moe_dp2",
    "tp2 cp2 ep2",
    "tp2 cp2 ep4",
    "tp2 cp2 moe_dp2",
    "tp2 cp2 moe_dp2 ep2",
    "tp4 cp2 moe_dp2 ep2 sp",
    "pp2 tp2 ep2 sp",
    "pp2 tp4 ep2",
    "pp2 tp2 cp2 ep4",
    "pp2 tp2 cp2 ep2 sp",
    "pp2 tp2 cp2 moe_dp2 ep2",
    "pp2 cp2 moe_dp2",
    "tp2 ep2 dispatched",
    "tp4 ep4 dispatched sp",
    "tp4 ep2 dispatched sp",
    "tp4 ep2 dispatched",
    "cp2 ep2 dispatched",
    "tp2 cp2 ep4 dispatched sp",
    "tp2 cp2 ep2 dispatched",
    "tp2 cp2 moe_dp2 ep2 dispatched sp",
    "pp2 tp2 cp2 ep4 dispatched sp",
    "pp2 tp2 ep2 dispatched few",
]
# Of four layers the first two have states, the others attention: of two stages each has one kind, of four none has both.
FOR_STATES = [
    "one",
    "one few",
    "pp2",
    "pp4",
    "pp4 few",
    "tp2",
    "tp2 sp",
    "tp4 sp",
    "cp2",
    "cp4",
    "cp2 few",
    "pp2 tp2 sp",
    "pp2 cp2",
    "pp2 cp2 few",
    "pp2 cp2 tensor",
    "tp2 cp2 sp",
    "pp2 tp2 cp2 sp",
    "one mtp3",
    "pp2 mtp3",
    "tp2 cp2 sp mtp3",
    "pp2 cp2 few mtp3",
]
FOR_STATES_AND_EXPERTS = [
    "tp2 ep2",
    "tp4 ep4",
    "cp2 ep2",
    "cp2 moe_dp2",
    "tp2 cp2 ep4",
    "pp2 tp2 ep2",
    "pp2 tp2 ep2 few",
    "tp2 ep2 dispatched",
    "cp2 ep2 dispatched",
    "pp2 tp2 cp2 ep4 dispatched sp",
    "pp2 tp2 ep2 sp mtp3",
]
FOR_THIRDS = ["tp3", "tp3 sp", "cp3", "pp2 tp3 sp", "tp3 cp2 sp"]

GRID = [
    *((family, plan) for family in DENSE for plan in FOR_ALL),
    *((family, plan) for family in MOE for plan in FOR_ALL + FOR_EXPERTS),
    *((family, plan) for family in HYBRID for plan in FOR_STATES),
    *((family, plan) for family in HYBRID_MOE for plan in FOR_STATES + FOR_STATES_AND_EXPERTS),
    *(("llama", plan) for plan in FOR_THIRDS),
]
# One of each form, and the pairs that could interact; each family twice or more.
FEW = [
    ("llama", "tp3 sp"),
    ("llama", "pp2 tp2 cp2 sp"),
    ("qwen2", "tp4"),
    ("qwen2", "pp2 cp2"),
    ("qwen3", "pp2 tp2 sp"),
    ("qwen3", "tp2 cp2 sp"),
    ("qwen2_moe", "tp4 ep2"),
    ("qwen2_moe", "tp2 cp2 moe_dp2 ep2"),
    ("qwen2_moe", "tp4 ep2 dispatched sp"),
    ("qwen3_moe", "pp2 tp2 cp2 ep4"),
    ("qwen3_moe", "tp2 cp2 ep4 dispatched sp"),
    ("qwen3_moe", "pp2 tp2 ep2 dispatched few"),
    ("qwen3_5", "pp4 few"),
    ("qwen3_5", "tp2 cp2 sp"),
    ("qwen3_5_moe", "pp2 tp2 ep2"),
    ("qwen3_5_moe", "cp2 ep2"),
    ("qwen3_next", "pp2 cp2 few"),
]
assert set(FEW) <= set(GRID)

_WORDS: dict[str, dict[str, Any]] = {
    "sp": {"sequence_parallel": "on"},
    "dispatched": {"experts": "dispatched"},
    "tensor": {"link": "tensor"},
    "few": {"num_pages": 20, "async_depth": 2},  # pages: it preempts
    "one": {},
}


def sizes_of(family: str, plan: str) -> dict[str, int]:
    """What a plan's checkpoint has in place of the usual tiny sizes."""
    experts = _EXPERTS if family in MOE + HYBRID_MOE else {}
    delta = _DELTA if family in HYBRID + HYBRID_MOE else {}
    return SIZES | experts | delta | (_THIRDS if plan in FOR_THIRDS else {})


def settings_of(plan: str) -> dict[str, Any]:
    """ "pp2 tp2 sp" as settings."""
    values: dict[str, Any] = {}
    for word in plan.split():
        name = word.rstrip("0123456789")
        if word in _WORDS:
            values |= _WORDS[word]
        else:
            number = int(word.removeprefix(name))
            values |= {"mtp": {"num_tokens": number}} if name == "mtp" else {SETTINGS[name]: number}
    return values
