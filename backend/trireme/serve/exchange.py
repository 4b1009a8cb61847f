"""Exchange: parcels between models inside the server. A message and rows are the tensors of a request, and of its response. What goes
wrong is an error of the server's, with its code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]  # only inside the server

from trireme.core.control import Parcel
from trireme.serve.seal import read_seal, unseal

_SEAL = read_seal()
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_CODES = {  # by Refusal.kind
    "invalid": pb_utils.TritonError.INVALID_ARG,
    "unavailable": pb_utils.TritonError.UNAVAILABLE,
    "cancelled": pb_utils.TritonError.CANCELLED,
    "deadline": pb_utils.TritonError.UNAVAILABLE,  # the server has no code for it
}


def ask(model: str, parcel: Parcel, *, rows: bool = False) -> Parcel:
    """One BLS call, which waits. `rows`: they travel in it."""
    names = ["MESSAGE", "ROWS"] if rows else ["MESSAGE"]
    tensors = _tensors(Parcel(_SEAL + parcel.packed, parcel.rows))
    response = pb_utils.InferenceRequest(model_name=model, requested_output_names=names, inputs=tensors).exec()
    if response.has_error():
        raise RuntimeError(response.error().message())
    outputs = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    return Parcel(outputs["MESSAGE"].tobytes(), outputs["ROWS"].copy() if "ROWS" in outputs else None)


def asked(request: Any) -> Parcel | None:
    """What a request to a model of ours carries; its rows lie in the request's own memory. None where it has no message. Refusal where
    it comes from outside this server."""
    message = pb_utils.get_input_tensor_by_name(request, "MESSAGE")
    rows = pb_utils.get_input_tensor_by_name(request, "ROWS")
    return None if message is None else Parcel(unseal(message.as_numpy().tobytes(), _SEAL), None if rows is None else rows.as_numpy())


def answer_to(request: Any) -> Callable[[Parcel], None]:
    """Sends one parcel back. It holds the request, whose memory the rows may still lie in."""
    sender = request.get_response_sender()

    def send(parcel: Parcel, request: Any = request) -> None:
        sender.send(pb_utils.InferenceResponse(_tensors(parcel)), flags=FINAL)

    return send


def send_error(sender: Any, error: Exception) -> None:
    """An error and FINAL."""
    code = _CODES.get(getattr(error, "kind", "internal"), pb_utils.TritonError.INTERNAL)
    sender.send(pb_utils.InferenceResponse([], pb_utils.TritonError(str(error), code)), flags=FINAL)


def _tensors(parcel: Parcel) -> list[Any]:
    tensors = [pb_utils.Tensor("MESSAGE", np.frombuffer(parcel.packed, dtype=np.uint8))]
    if parcel.rows is not None:
        tensors.append(pb_utils.Tensor("ROWS", parcel.rows))
    return tensors
