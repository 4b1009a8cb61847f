"""Client: streams answers of a running front over gRPC, from and to plain Python values. What the values mean is in serve/signature."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton_grpc
from grpc.aio import AioRpcError
from tritonclient.utils import InferenceServerException

from trireme.core.refusal import Refusal
from trireme.serve.signature import INPUTS

_DTYPES = {"STRING": ("BYTES", np.object_), "BOOL": ("BOOL", np.bool_), "FP32": ("FP32", np.float32)} | {
    name: (name, np.dtype(name.lower())) for name in ("INT32", "UINT64")
}


class Client:
    """One gRPC connection; any number of streams at once. Use as `async with Client(...) as client`."""

    def __init__(self, url: str, model: str = "llm"):
        self._url, self._model = url, model
        self._grpc = triton_grpc.InferenceServerClient(url)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._grpc.close()

    def stream(self, **values: Any) -> AsyncIterator[dict[str, list[Any]]]:
        """The responses to one request, outputs by name; texts as str. Refusal with the server's sentence. Leaving the
        loop early cancels the request."""
        return self.send(self.request(**values))

    def request(self, *outputs: str, **values: Any) -> dict[str, Any]:
        """What `send` takes, made ahead. `outputs`: those wanted; none named: all that the model sends."""
        wanted = [triton_grpc.InferRequestedOutput(name) for name in outputs] or None
        return {"model_name": self._model, "inputs": tensors(values), "outputs": wanted}

    async def send(self, request: dict[str, Any]) -> AsyncIterator[dict[str, list[Any]]]:
        """As `stream`."""
        responses: Any = self._grpc.stream_infer(_once(request))
        try:
            async for result, error in responses:
                if error is not None:
                    raise error
                yield {output.name: _plain(result.as_numpy(output.name)) for output in result.get_response().outputs}
        except InferenceServerException as error:
            raise Refusal(f"{self._model} refused", why=error.message()) from None
        except AioRpcError as error:
            fix = "is a server up? `trireme serve` starts one"
            raise Refusal(f"no answer from {self._url}", why=error.details() or "", fix=fix, kind="unavailable") from None
        finally:
            responses.cancel()


def tensors(values: dict[str, Any]) -> list[triton_grpc.InferInput]:
    """Named values as the input tensors that the front declares."""
    types = {field.name: field.type for field in INPUTS}
    made = []
    for name, value in values.items():
        triton_type, dtype = _DTYPES[types[name]]
        flat = np.array([item.encode() if isinstance(item, str) else item for item in np.atleast_1d(value).tolist()], dtype=dtype)
        tensor = triton_grpc.InferInput(name, list(flat.shape), triton_type)
        tensor.set_data_from_numpy(flat)
        made.append(tensor)
    return made


async def _once(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield request


def _plain(values: np.ndarray | None) -> list[Any]:
    flat = [] if values is None else values.reshape(-1).tolist()
    return [value.decode() if isinstance(value, bytes) else value for value in flat]
