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
    within: Callable[[Result], bool]
    needs: Callable[[Spec], bool] = lambda spec: True  # of a checkpoint


class Result(NamedTuple):
    """What a test of one family under one plan found."""

    family: str
    sizes: Sizes
    passed: bool
    mtp: int = 0  # drafts


def _experts(spec: Spec) -> bool:
    return any(spec.sparse)


def _head(spec: Spec) -> bool:
    return spec.num_mtp_layers > 0


FORMS = (
    Form("PP", Sizes(pp=2), lambda result: result.sizes.pp > 1),
    Form("TP", Sizes(tp=2), lambda result: result.sizes.tp > 1),
    Form("SP", Sizes(tp=2, sp=True), lambda result: result.sizes.sp),
    Form("CP", Sizes(cp=2), lambda result: result.sizes.cp > 1),
    Form("EP gathered", Sizes(tp=2, ep=2), lambda result: result.sizes.ep > 1 and result.sizes.experts == "gathered", _experts),
    Form(
        "EP dispatched",
        Sizes(tp=2, ep=2, experts="dispatched"),
        lambda result: result.sizes.ep > 1 and result.sizes.experts == "dispatched",
        _experts,
    ),
    Form("MoE-TP", Sizes(tp=2), lambda result: result.sizes.tp * result.sizes.cp > result.sizes.ep * result.sizes.moe_dp, _experts),
    Form("MoE-DP", Sizes(cp=2, moe_dp=2), lambda result: result.sizes.moe_dp > 1, _experts),
    Form("MTP", Sizes(), lambda result: result.mtp > 0, _head),
)

# Sizes that every form divides; what a family adds to them are its reader's defaults.
_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
    "mtp_num_hidden_layers": 1,  # families without such a head do not ask
}
_PASSED, _FAILED, _UNTESTED, _REFUSED = "✓", "✗", "·", "–"


def support_matrix(results: list[Result]) -> str:
    """A Markdown table. A tick only where tests of that form passed and none failed."""
    lines = [["family", *(form.name for form in FORMS)], ["---"] * (1 + len(FORMS))]
    specs = (make_spec({"architectures": [architecture], **_SIZES}) for architecture in ARCHITECTURES)
    for family, spec in {spec.family: spec for spec in specs}.items():
        lines.append([family, *(_cell(form, spec, results) for form in FORMS)])
    legend = f"{_PASSED} its tests pass · {_UNTESTED} legal, no test was run · {_FAILED} a test fails · {_REFUSED} refused at load"
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{legend}"


def read_results(path: Path) -> list[Result]:
    """Of a file `[{"family": "llama", "plan": {"pp": 2, "tp": 2, "sp": true}, "passed": true}]`; what a plan leaves out is 1 or off."""
    try:
        return [_result(each) for each in json.loads(path.read_text())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{path} has no results of plans", why=repr(error), fix="run `make test-plans`, which writes it") from None


def _result(values: dict[str, Any]) -> Result:
    plan = dict(values["plan"])
    mtp = plan.pop("mtp", 0)
    return Result(values["family"], Sizes(**plan), values["passed"], mtp)


def _cell(form: Form, spec: Spec, results: list[Result]) -> str:
    if not form.needs(spec):
        return _REFUSED
    try:
        Plan.of(form.least.settings(Settings(model="")), spec)
    except Refusal:
        return _REFUSED
    passed = [result.passed for result in results if result.family == spec.family and form.within(result)]
    return _UNTESTED if not passed else _PASSED if all(passed) else _FAILED
