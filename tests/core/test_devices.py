"""Where ranks compute: GPUs where there is one for each, as named, and clear words where there is not."""

import pytest

from trireme.core import devices
from trireme.core.devices import num_gpus, place_ranks, steps_in_flight
from trireme.core.refusal import Refusal
from trireme.core.settings import Settings, make_settings


@pytest.fixture
def host(tmp_path, monkeypatch):
    """host(n): this host has n GPUs."""
    monkeypatch.setattr(devices, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def have(num: int) -> None:
        for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(num))):
            (tmp_path / name).touch()

    return have


def settings(**values) -> Settings:
    return make_settings({"model": "m", **values})


def test_auto_takes_gpus_only_where_each_rank_gets_one(host):
    four = settings(pipeline_parallel_size=2, tensor_parallel_size=2)
    assert place_ranks(four) is None
    host(3)
    assert place_ranks(four) is None
    host(4)
    assert place_ranks(four) == [[0, 1], [2, 3]]
    assert place_ranks(settings(device="cpu")) is None


def test_gpus_get_one_more_step_in_flight(host):
    two = {"pipeline_parallel_size": 2}
    assert steps_in_flight(settings(**two)) == 3
    host(2)
    assert steps_in_flight(settings(**two)) == 4
    assert steps_in_flight(settings(**two, device="cpu")) == 3
    assert [steps_in_flight(settings(**two, async_depth=depth)) for depth in (0, 1, 3)] == [2, 3, 5]


def test_gpus_that_are_not_here(host):
    with pytest.raises(Refusal, match=r"devices names GPU 0, and this host has 0.*leave devices out"):
        place_ranks(settings(devices=[[0]]))
    with pytest.raises(Refusal, match=r"device is cuda, 1 ranks need a GPU each, and this host has 0"):
        place_ranks(settings(device="cuda"))
    host(2)
    assert place_ranks(settings(tensor_parallel_size=2, devices=[[1, 0]])) == [[1, 0]]
    with pytest.raises(Refusal, match=r"devices names GPU 2, and this host has 2.*name 2 of those there are"):
        place_ranks(settings(pipeline_parallel_size=2, devices=[[1], [2]]))


def test_what_the_environment_hides_is_not_here(host, monkeypatch):
    host(2)
    for shown, count in (("1", 1), ("0,1", 2), ("0,1,2", 2), ("", 0), ("-1", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert num_gpus() == count


def test_settings_that_contradict_each_other():
    with pytest.raises(Refusal, match="device is cpu"):
        settings(device="cpu", devices=[[0]])
    with pytest.raises(Refusal, match=r"gpu_memory_utilization=1\.5 is too much"):
        settings(gpu_memory_utilization=1.5)
