"""The server's own metrics between two readings."""

from trireme_tools.scrape import between, read_page

PAGE = """\
# TYPE trireme_steps_total counter
trireme_steps_total{{model="llm",version="1"}} {steps}
# TYPE trireme_step_rows_total counter
trireme_step_rows_total{{model="llm",version="1"}} {rows}
# TYPE trireme_bls_hop_seconds_sum counter
trireme_bls_hop_seconds_sum{{model="llm",version="1"}} {hops}
# TYPE trireme_bls_hop_seconds_count counter
trireme_bls_hop_seconds_count{{model="llm",version="1"}} {steps}
# TYPE trireme_stage_busy_seconds_total counter
trireme_stage_busy_seconds_total{{model="llm",stage="0",version="1"}} {busy}
# TYPE trireme_stage_reordered_steps gauge
trireme_stage_reordered_steps{{model="llm",stage="0",version="1"}} {early}
# TYPE nv_inference_count counter
nv_inference_count{{model="llm"}} 7
"""


def test_growth_by_the_second(tmp_path):
    pages = []
    for number, values in enumerate(
        ({"steps": 10, "rows": 40, "hops": 0.5, "busy": 3, "early": 1}, {"steps": 30, "rows": 120, "hops": 0.54, "busy": 7, "early": 4})
    ):
        path = tmp_path / str(number)
        path.write_text(PAGE.format(**values))
        pages.append(read_page(path.as_uri()))
    found = between(*pages, seconds=5.0)
    assert (found["steps_per_s"], found["rows_per_step"], round(found["bls_hop_ms"], 6)) == (4.0, 4.0, 2.0)
    assert (found["stage_busy_share"], found["stage_reordered_steps"], found["faults"]) == ({"0": 0.8}, {"0": 3.0}, 0.0)
