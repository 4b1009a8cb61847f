"""The eplb role: the one place that knows loads and maps. Stages push to it by BLS, people ask it over HTTP; what it answers is the
balancer's matter. Serving goes on without it: stages keep their maps, and the front loads it again if it dies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]  # only inside the server

from trireme.core.control import Offer, Parcel, Status, open_push, pack_offer
from trireme.core.log import logger
from trireme.core.refusal import Refusal
from trireme.core.settings import read_settings
from trireme.serve.balancing import Balancing
from trireme.serve.checks import check_checkpoint, check_instance, server_flags
from trireme.serve.exchange import FINAL, answer_to, asked, send_error
from trireme.serve.metrics import Reporter, Sample, eplb_samples
from trireme.serve.place import model_json
from trireme.serve.repository import FRONT


class Eplb:
    """Requests are answered one after another, in the server's thread: those who ask wait in threads of their own."""

    def __init__(self, args: dict[str, str], config: dict[str, Any]):
        check_instance(config)
        settings = read_settings(model_json(args))
        if settings.eplb is None:
            what = f"{config['name']} has nothing to do"
            raise Refusal(what, why="eplb is not set in model.json", fix="set it, or remove this model from the repository")
        check_checkpoint(settings)
        self._log = logger("eplb")
        self._balancing = Balancing(settings)
        labels = {"model": settings.served_model_name or FRONT, "version": args["model_version"]}
        self._reporter = Reporter(pb_utils.MetricFamily, self._samples, labels) if server_flags().metrics else None
        self._reports = False

    def execute(self, requests: list[Any]) -> None:
        if self._reporter is not None and not self._reports:
            self._reporter.start()  # only now: before the model is loaded the server does not take metrics
            self._reports = True
        for request in requests:
            try:
                if (parcel := asked(request)) is not None:
                    answer_to(request)(Parcel(pack_offer(self._offer(parcel))))
                else:
                    self._tell(request)
            except Exception as error:
                if not isinstance(error, Refusal):
                    self._log.exception("a request could not be answered")
                send_error(request.get_response_sender(), error)

    def finalize(self) -> None:
        if self._reporter is not None:
            self._reporter.stop()
        self._balancing.save()

    def _offer(self, parcel: Parcel) -> Offer:
        push = open_push(parcel.packed)
        return Offer() if isinstance(push, Status) else self._balancing.push(push)

    def _tell(self, request: Any) -> None:
        query = pb_utils.get_input_tensor_by_name(request, "query")
        words = "" if query is None else query.as_numpy().reshape(-1)[0].decode(errors="replace")
        text = json.dumps(self._balancing.query(words))
        tensor = pb_utils.Tensor("text_output", np.array([text.encode()], dtype=np.object_))
        request.get_response_sender().send(pb_utils.InferenceResponse([tensor]), flags=FINAL)

    def _samples(self) -> Iterator[Sample]:
        return eplb_samples(self._balancing.query("state"))
