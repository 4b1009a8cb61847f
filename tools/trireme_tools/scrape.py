"""Scrape: what the server's own metrics say of the time between two readings. Reads pages; judges nothing."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from trireme.core.refusal import Refusal

_PREFIX = "trireme_"
Page = Mapping[tuple[str, str], float]  # (name without the prefix and _total, stage or "") -> sum over all other labels


def read_page(url: str) -> Page:
    """Our series on a /metrics page; Refusal where there is none."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
    except OSError as error:
        raise Refusal(f"no metrics at {url}", why=str(error), fix="give --metrics-url, or none with --metrics-url ''") from None
    page: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            if name.startswith(_PREFIX):
                # the parser ends every counter's name with _total
                key = (name.removeprefix(_PREFIX).removesuffix("_total"), labels.get("stage", ""))
                page[key] = page.get(key, 0.0) + value
    return page


def between(before: Page, after: Page, seconds: float) -> dict[str, float | dict[str, float] | None]:
    """Steps and hops of `seconds` seconds, and each stage's share of them spent computing and the steps it put in order."""
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
    steps, hops = grown.get(("steps", ""), 0.0), grown.get(("bls_hop_seconds_count", ""), 0.0)
    stages = sorted(stage for name, stage in after if name == "stage_busy_seconds")
    return {
        "steps_per_s": steps / seconds,
        "rows_per_step": grown.get(("step_rows", ""), 0.0) / steps if steps else 0.0,
        "bls_hop_ms": 1e3 * grown.get(("bls_hop_seconds_sum", ""), 0.0) / hops if hops else 0.0,
        "preemptions": grown.get(("preemptions", ""), 0.0),
        "faults": grown.get(("faults", ""), 0.0),
        "acceptance_length": acceptance_length(before, after),
        "stage_busy_share": {stage: grown[("stage_busy_seconds", stage)] / seconds for stage in stages},
        "stage_reordered_steps": {stage: grown.get(("stage_reordered_steps", stage), 0.0) for stage in stages},
    }


def acceptance_length(before: Page, after: Page) -> float | None:
    """Mean tokens that a sequence got from a step that verified drafts of it; None where none did."""
    verified, accepted = (after.get((name, ""), 0.0) - before.get((name, ""), 0.0) for name in ("mtp_verifications", "mtp_accepted_tokens"))
    return 1.0 + accepted / verified if verified else None
