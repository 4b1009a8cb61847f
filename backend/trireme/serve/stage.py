"""The stage role: a thin leader. It hands the bytes of a message to its ranks and answers when they answer; it waits for nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from trireme.core.control import Offer, Parcel, Push, open_offer, pack_push
from trireme.core.refusal import Refusal
from trireme.core.settings import Settings, read_settings
from trireme.models.spec import read_spec
from trireme.ranks.courier import Courier
from trireme.ranks.leader import Leader
from trireme.serve.balancing import first_maps
from trireme.serve.bls import SETTLE_S, BlsCalls
from trireme.serve.checks import check_checkpoint, check_devices, check_instance
from trireme.serve.exchange import answer_to, ask, asked, send_error
from trireme.serve.place import leave, model_json, run_dir
from trireme.serve.repository import EPLB, stage_name

_PUSH_S = 20.0  # `eplb` may be placing the experts of many layers for another stage


class Stage:
    """One stage of the pipeline. Its answers come late and from the leader's threads, so calls overlap."""

    def __init__(self, args: dict[str, str], config: dict[str, Any]):
        check_instance(config)
        settings = read_settings(model_json(args))
        check_checkpoint(settings)
        check_devices(settings)
        stage = _number_of(config, settings)
        self._run_dir = run_dir()
        self._service = None if settings.eplb is None else _Service(stage)
        push = None if self._service is None else self._service.courier.push
        self._leader = Leader(settings, stage, self._run_dir, maps=_first_maps(settings, stage), push=push)
        if self._service is not None:
            self._service.start(self._leader)
        self._leader.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            try:
                parcel = asked(request)
                assert parcel is not None, "the server refuses a request without it"
                self._leader.post(parcel, answer_to(request))
            except Refusal as refusal:
                send_error(request.get_response_sender(), refusal)

    def finalize(self) -> None:
        if self._service is not None:
            self._service.stop()  # first of all: see serve/front
        self._leader.stop()
        leave(self._run_dir)


class _Service:
    """The model `eplb`, as a stage's courier reaches it. While it is dead or away, its calls fail and serving goes on."""

    def __init__(self, stage: int):
        self.courier = Courier(stage_name(stage), self._push)
        self._calls = BlsCalls([EPLB], ask, num_threads=1)
        self._begins_at = time.monotonic() + SETTLE_S

    def start(self, leader: Leader) -> None:
        self._calls.start()
        self.courier.start(leader.prepare)

    def stop(self) -> None:
        self._calls.stop()
        self.courier.stop()

    def _push(self, push: Push) -> Offer:
        time.sleep(max(0.0, self._begins_at - time.monotonic()))
        return open_offer(self._calls.ask(0, Parcel(pack_push(push)), _PUSH_S).packed)


def _number_of(config: dict[str, Any], settings: Settings) -> int:
    """Which stage of the pipeline this model is."""
    given = config["parameters"].get("stage", {}).get("string_value")
    if given not in map(str, range(settings.num_stages)):
        raise Refusal(
            f"model {config['name']}: parameter `stage` is {given!r}",
            why=f"model.json has {settings.num_stages} stages, counted from 0",
            fix="let `trireme repo` write the repository, which gives each stage its model",
        )
    return int(given)


def _first_maps(settings: Settings, stage: int) -> Any:
    """Of the stage's experts, for its leader."""
    return None if settings.eplb is None else first_maps(settings, read_spec(Path(settings.model)))[stage]
