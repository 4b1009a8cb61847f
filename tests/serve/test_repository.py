"""The checked-in model repository is what `repository` writes; settings are read back through every model's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from trireme.core.refusal import Refusal
from trireme.core.settings import make_settings, read_settings
from trireme.serve.repository import files, tensors, write_repository

HOME = Path(__file__).parents[2]
CHECKED_IN = {"model": "models/SmolLM2-135M-Instruct", "pipeline_parallel_size": 2}


def test_checked_in_repository_is_generated():
    expected = files(make_settings(CHECKED_IN))
    found = {path.relative_to(HOME / "model_repository") for path in (HOME / "model_repository").rglob("*") if path.is_file()}
    assert found == set(expected)
    for path, text in expected.items():
        assert (HOME / "model_repository" / path).read_text() == text, path


def test_every_model_reads_the_same_settings(tmp_path):
    write_repository(make_settings({"model": "models/x", "pipeline_parallel_size": 3, "link": "tensor"}), tmp_path / "repository")
    read = {read_settings(path) for path in (tmp_path / "repository").glob("*/1/model.json")}
    assert len(list((tmp_path / "repository").glob("*/1/model.json"))) == 4
    assert read == {make_settings({"model": str(tmp_path / "models/x"), "pipeline_parallel_size": 3, "link": "tensor"})}


def test_eplb_is_a_model_where_it_is_on(tmp_path):
    settings = make_settings({"model": str(tmp_path / "models/x"), "eplb": {"num_redundant_experts": 2, "state": str(tmp_path / "loads")}})
    write_repository(settings, tmp_path / "repository")
    assert read_settings(tmp_path / "repository" / "eplb" / "1" / "model.json") == settings
    assert 'key: "role" value { string_value: "eplb" }' in (tmp_path / "repository" / "eplb" / "config.pbtxt").read_text()
    inputs, _ = tensors("eplb")
    assert [entry["name"] for entry in inputs] == ["MESSAGE", "query"] and all(entry["optional"] for entry in inputs)
    assert not any("eplb" in path.parts for path in files(make_settings({"model": "models/x"})))
    with pytest.raises(Refusal, match=r"has a model eplb.*remove it, set eplb"):
        write_repository(make_settings({"model": "models/x"}), tmp_path / "repository")


def test_a_stage_too_many_is_not_left_for_the_server(tmp_path):
    write_repository(make_settings({"model": "models/x", "pipeline_parallel_size": 3}), tmp_path)
    with pytest.raises(Refusal, match=r"has a stage_2.*remove"):
        write_repository(make_settings({"model": "models/x", "pipeline_parallel_size": 2}), tmp_path)
