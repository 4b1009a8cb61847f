"""The support matrix of README: which family runs in which parallel form, by the validator of plans and by what tests found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.models.planner import Sizes
from trireme.models.spec import ARCHITECTURES, Spec, make_spec
from trireme.parallel.plan import Plan


class Form(NamedTuple):
    """A parallel form: the least plan that has it, and whether a plan has it."""

    name: str
    least: Sizes
    within: Callable[[Sizes], bool]
    of_experts: bool = False


class Result(NamedTuple):
    """What a test of one family under one plan found."""

    family: str
    sizes: Sizes
    passed: bool


FORMS = (
    Form("PP", Sizes(pp=2), lambda sizes: sizes.pp > 1),
    Form("TP", Sizes(tp=2), lambda sizes: sizes.tp > 1),
    Form("SP", Sizes(tp=2, sp=True), lambda sizes: sizes.sp),
    Form("CP", Sizes(cp=2), lambda sizes: sizes.cp > 1),
    Form("EP gathered", Sizes(tp=2, ep=2), lambda sizes: sizes.ep > 1 and sizes.experts == "gathered", True),
    Form("EP dispatched", Sizes(tp=2, ep=2, experts="dispatched"), lambda sizes: sizes.ep > 1 and sizes.experts == "dispatched", True),
    Form("MoE-TP", Sizes(tp=2), lambda sizes: sizes.tp * sizes.cp > sizes.ep * sizes.moe_dp, True),
    Form("MoE-DP", Sizes(cp=2, moe_dp=2), lambda sizes: sizes.moe_dp > 1, True),
)

# Sizes that every form divides; what a family adds to them are its reader's defaults.
_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
}
_PASSED, _FAILED, _UNTESTED, _REFUSED = "✓", "✗", "·", "–"


def support_matrix(results: list[Result]) -> str:
    """A Markdown table. A tick only where tests of that form passed and none failed."""
    lines = [["family", *(form.name for form in FORMS)], ["---"] * (1 + len(FORMS))]
    for architecture in ARCHITECTURES:
        spec = make_spec({"architectures": [architecture], **_SIZES})
        lines.append([spec.family, *(_cell(form, spec, results) for form in FORMS)])
    legend = f"{_PASSED} its tests pass · {_UNTESTED} legal, no test was run · {_FAILED} a test fails · {_REFUSED} refused at load"
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{legend}"


def read_results(path: Path) -> list[Result]:
    """Of a file `[{"family": "llama", "plan": {"pp": 2, "tp": 2, "sp": true}, "passed": true}]`; what a plan leaves out is 1 or off."""
    try:
        return [_result(each) for each in json.loads(path.read_text())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{path} has no results of plans", why=repr(error), fix="run `make test-plans`, which writes it") from None


def _result(values: dict[str, Any]) -> Result:
    return Result(values["family"], Sizes(**values["plan"]), values["passed"])


def _cell(form: Form, spec: Spec, results: list[Result]) -> str:
    if form.of_experts and not any(spec.sparse):
        return _REFUSED
    try:
        Plan.of(form.least.settings(Settings(model="")), spec)
    except Refusal:
        return _REFUSED
    passed = [result.passed for result in results if result.family == spec.family and form.within(result.sizes)]
    return _UNTESTED if not passed else _PASSED if all(passed) else _FAILED
