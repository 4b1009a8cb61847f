"""The settings file: read, followed from a stage, and refused in a sentence that names the key."""

import json
from pathlib import Path

import pytest

from trireme.core.refusal import Refusal
from trireme.core.settings import Limits, Settings, make_settings, read_settings, write_settings


def repository(home: Path, values: object) -> Path:
    for model, text in {"llm": json.dumps(values), "stage_0": '{"settings": "../../llm/1/model.json"}'}.items():
        folder = home / "repo" / model / "1"
        folder.mkdir(parents=True)
        (folder / "model.json").write_text(text)
    return home / "repo"


def test_a_stage_reads_the_fronts_file_and_paths_start_beside_the_repository(tmp_path):
    repo = repository(tmp_path, {"model": "models/tiny", "pipeline_parallel_size": 2})
    front, stage = (read_settings(repo / name / "1" / "model.json") for name in ("llm", "stage_0"))
    assert front == stage
    assert front.model == str(tmp_path / "models" / "tiny")
    assert (front.num_stages, front.async_depth, front.fed_back) == (2, None, True)


def test_paths_of_eplb_start_there_too(tmp_path):
    repo = repository(tmp_path, {"model": "m", "eplb": {"state": "loads", "initial_map": "maps.safetensors"}})
    eplb = read_settings(repo / "stage_0" / "1" / "model.json").eplb
    assert eplb is not None and (eplb.state, eplb.initial_map) == (str(tmp_path / "loads"), str(tmp_path / "maps.safetensors"))
    assert Limits.of(make_settings({"model": "m", "eplb": {"count_every": 3}}), inflight=2, max_model_len=16, num_pages=1).count_every == 3
    assert Limits.of(make_settings({"model": "m"}), inflight=2, max_model_len=16, num_pages=1).count_every is None


def test_written_settings_read_back(tmp_path):
    settings = make_settings({"model": "/m", "link": "tensor", "layer_cut": [3, 1], "pipeline_parallel_size": 2, "mtp": {"num_tokens": 2}})
    repo = repository(tmp_path, json.loads(write_settings(settings)))
    assert read_settings(repo / "llm" / "1" / "model.json") == settings


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model": "m", "pipeline_paralel_size": 2}, "did you mean 'pipeline_parallel_size'"),
        ({}, "model"),
        ({"model": "m", "max_num_seqs": "many"}, "max_num_seqs"),
        ({"model": "m", "max_num_seqs": 0}, "max_num_seqs=0 is too small"),
        ({"model": "m", "link": "telepathy"}, "link"),
        ({"model": "m", "layer_cut": [4], "pipeline_parallel_size": 2}, "layer_cut names 1 stages"),
        ({"model": "m", "context_parallel_size": 0}, "context_parallel_size=0 is too small"),
        ({"model": "m", "experts": "scattered"}, "experts"),
        ({"model": "m", "sequence_parallel": "auto"}, "sequence_parallel='auto' is none of off, on and a number of rows"),
        ({"model": "m", "sequence_parallel": True}, "sequence_parallel=True is none of"),
        ({"model": "m", "sequence_parallel": 0}, "sequence_parallel=0 is none of"),
        ({"model": "m", "mtp": {"num_token": 2}}, "num_token"),
        ({"model": "m", "mtp": {"num_tokens": 16}}, "mtp asks for 16 drafts"),
        ({"model": "m", "mtp": {"max_batch_size": -1}}, "mtp.max_batch_size=-1 is too small"),
        ({"model": "m", "state_cache_memory_bytes": -1}, "state_cache_memory_bytes=-1 is too small"),
        ({"model": "m", "mtp": {"num_tokens": -1}}, "mtp asks for -1 drafts"),
        ({"model": "m", "eplb": {"count_every": 0}}, "eplb.count_every=0 is too small"),
        ({"model": "m", "eplb": {"policy": "fair"}}, "policy"),
        ({"model": "m", "devices": [[0], [1]]}, "devices names 2 stages but pipeline_parallel_size is 1"),
        ({"model": "m", "tensor_parallel_size": 2, "context_parallel_size": 2, "devices": [[0, 1]]}, "names 2 for the 4 ranks of stage 0"),
        ({"model": "m", "pipeline_parallel_size": 2, "devices": [[0], [1, 2]]}, "names 2 for the 1 ranks of stage 1"),
        ({"model": "m", "pipeline_parallel_size": 2, "devices": [[0], [-1]]}, "numbered from 0"),
        ({"model": "m", "pipeline_parallel_size": 2, "tensor_parallel_size": 2, "devices": [[0, 1], [2, 0]]}, "device 0 twice"),
    ],
)
def test_bad_settings_are_refused_by_name(values, says):
    with pytest.raises(Refusal, match=says):
        make_settings(values)


def test_a_stage_has_tp_times_cp_ranks():
    wide = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "context_parallel_size": 2, "expert_parallel_size": 4}
    settings = make_settings({"model": "m", **wide, "devices": [[0, 1, 2, 3], [4, 5, 6, 7]]})
    assert (settings.ranks_per_stage, settings.world) == (4, 8)


@pytest.mark.parametrize(("given", "tp", "rows"), [("off", 4, None), ("on", 4, 4), (64, 4, 64), ("on", 1, None), (64, 1, None)])
def test_sequence_parallelism_begins_at_a_number_of_rows(given, tp, rows):
    settings = make_settings({"model": "m", "sequence_parallel": given, "tensor_parallel_size": tp, "context_parallel_size": 2})
    assert settings.sp_from == rows
    limits = Limits.of(settings, inflight=2, max_model_len=32, num_pages=2)
    assert (limits.sp_from, limits.cp) == (rows, 2)


@pytest.mark.parametrize(("said", "num_layers", "num_drafts"), [(None, 0, 0), (None, 1, 3), (0, 1, 0), (0, 0, 0), (2, 1, 2)])
def test_drafts_are_made_where_the_checkpoint_has_a_head(said, num_layers, num_drafts):
    settings = make_settings({"model": "m", "mtp": {"num_tokens": said, "adaptive": False, "max_batch_size": 5}})
    assert settings.mtp.num_drafts(num_layers) == num_drafts
    limits = Limits.of(settings, inflight=2, max_model_len=32, num_pages=2, num_snapshots=7, num_drafts=num_drafts)
    assert (limits.num_drafts, limits.adaptive_drafts, limits.max_drafting, limits.num_snapshots) == (num_drafts, False, 5, 7)


def test_drafts_without_a_head_are_refused():
    with pytest.raises(Refusal, match="no head to make them"):
        make_settings({"model": "m", "mtp": {"num_tokens": 2}}).mtp.num_drafts(0)


def test_broken_files_are_refused(tmp_path):
    with pytest.raises(Refusal, match="missing"):
        read_settings(tmp_path / "a" / "b" / "c" / "model.json")
    repo = repository(tmp_path, [1])
    with pytest.raises(Refusal, match="not a JSON object"):
        read_settings(repo / "llm" / "1" / "model.json")
    (repo / "llm" / "1" / "model.json").write_text("{")
    with pytest.raises(Refusal, match="not JSON"):
        read_settings(repo / "llm" / "1" / "model.json")


def test_a_sequence_must_fit():
    with pytest.raises(Refusal, match="cannot hold one sequence"):
        Limits.of(Settings(model="m"), inflight=2, max_model_len=33, num_pages=2)
    assert Limits.of(Settings(model="m"), inflight=2, max_model_len=32, num_pages=2).num_pages == 2
