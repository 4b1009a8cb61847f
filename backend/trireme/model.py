"""The entry of the server: TritonPythonModel reads a model's role (front, stage or eplb) and hands over. No decisions here.

The server imports this file by path, and its stub ignores PYTHONPATH: import roots come from where the file really lies.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]  # only inside the server

_BACKEND = Path(__file__).resolve().parents[1]
for _root in (_BACKEND, _BACKEND.parent / "kernels"):
    if _root.is_dir() and str(_root) not in sys.path:
        sys.path.insert(0, str(_root))


class TritonPythonModel:
    """A model of ours, in the server's words."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Declares every tensor; runs in a process of its own, and starts nothing."""
        from trireme.serve.repository import tensors

        role = _role(auto_complete_model_config.as_dict())
        inputs, outputs = tensors(role)
        for entry in inputs:
            auto_complete_model_config.add_input(entry)
        for entry in outputs:
            auto_complete_model_config.add_output(entry)
        auto_complete_model_config.set_max_batch_size(0)
        auto_complete_model_config.set_model_transaction_policy({"decoupled": role == "front"})
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        from trireme.core.garbage import settle
        from trireme.core.refusal import Refusal

        config = json.loads(args["model_config"])
        try:
            match _role(config):
                case "front":
                    from trireme.serve.front import Front as Role
                case "stage":
                    from trireme.serve.stage import Stage as Role
                case _:
                    from trireme.serve.eplb import Eplb as Role
            self._model = Role(args, config)
            settle()
        except Refusal as refusal:
            raise pb_utils.TritonModelException(str(refusal)) from None

    def execute(self, requests: list[Any]) -> None:
        """Returns at once; answers go through the requests' response senders."""
        self._model.execute(requests)

    def finalize(self) -> None:
        self._model.finalize()


def _role(config: dict[str, Any]) -> str:
    role = config.get("parameters", {}).get("role", {}).get("string_value")
    if role not in ("front", "stage", "eplb"):
        raise pb_utils.TritonModelException(
            f"model {config['name']}: parameter `role` is {role!r}; set it to front, stage or eplb (`trireme repo`)"
        )
    return role
