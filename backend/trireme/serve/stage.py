"""The stage role: a thin leader. It hands the bytes of a message to its ranks and answers when they answer; it waits for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]  # only inside the server

from trireme.core.control import Parcel
from trireme.core.settings import read_settings
from trireme.ranks.leader import Leader
from trireme.serve.checks import check_checkpoint, check_devices, check_instance
from trireme.serve.place import leave, model_json, run_dir


class Stage:
    """One stage of the pipeline. Its answers come late and from the leader's threads, so calls overlap."""

    def __init__(self, args: dict[str, str], config: dict[str, Any]):
        check_instance(config)
        settings = read_settings(model_json(args))
        check_checkpoint(settings)
        check_devices(settings)
        stage = int(config["parameters"]["stage"]["string_value"])
        self._run_dir = run_dir()
        self._leader = Leader(settings, stage, self._run_dir)
        self._leader.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            message = pb_utils.get_input_tensor_by_name(request, "MESSAGE").as_numpy().tobytes()
            rows = pb_utils.get_input_tensor_by_name(request, "ROWS")
            self._leader.post(Parcel(message, None if rows is None else rows.as_numpy()), _answer(request))

    def finalize(self) -> None:
        self._leader.stop()
        leave(self._run_dir)


def _answer(request: Any) -> Callable[[Parcel], None]:
    """Sends one parcel back. It holds the request, whose memory the rows may still lie in."""
    sender = request.get_response_sender()

    def send(parcel: Parcel, request: Any = request) -> None:
        tensors = [pb_utils.Tensor("MESSAGE", np.frombuffer(parcel.packed, dtype=np.uint8))]
        if parcel.rows is not None:
            tensors.append(pb_utils.Tensor("ROWS", parcel.rows))
        sender.send(pb_utils.InferenceResponse(tensors), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    return send
