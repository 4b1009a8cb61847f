"""The front role: users' requests in, text out. Admission here, decisions in the engine, steps to the stages over BLS.

execute          read, tokenise, submit; returns at once
engine's thread  emissions into the streams' inboxes
answer thread    emissions -> text -> response; all that waits for one stream goes in one response
cancel thread    asks the server which clients are gone (33 us each, measured: off the hot path)
"""

from __future__ import annotations

import functools
import itertools
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]  # only inside the server

from trireme.core.control import Parcel, StageState, Status, open_answer, pack_ask, pack_push
from trireme.core.devices import steps_in_flight
from trireme.core.log import logger
from trireme.core.refusal import Refusal
from trireme.core.request import Emission, Request
from trireme.core.settings import read_settings
from trireme.engine.engine import Engine
from trireme.engine.sampling import Defaults, make_sampling
from trireme.models.spec import read_spec
from trireme.serve.answer import Answer, Values
from trireme.serve.bls import SETTLE_S, BlsStages
from trireme.serve.checks import check_checkpoint, check_devices, check_instance, check_server, server_flags
from trireme.serve.exchange import FINAL, ask, send_error
from trireme.serve.metrics import Reporter, Sample, samples, service_samples, stage_samples
from trireme.serve.place import model_json
from trireme.serve.repository import EPLB, stage_name
from trireme.serve.signature import OUTPUTS, Order, read_order
from trireme.serve.text import Text

_CANCEL_PERIOD_S = 0.025
_STATUS_S = 5.0
_DTYPES = {field.name: pb_utils.triton_string_to_numpy(f"TYPE_{field.type}") for field in OUTPUTS}


@dataclass(eq=False)
class _Stream:
    """One request under way. Only the answer thread sends for it."""

    id: str
    sender: Any
    answer: Answer
    inbox: deque[Emission] = field(default_factory=deque)
    queued: bool = False  # for the answer thread
    cancelled: bool = False  # the client is gone
    lock: threading.Lock = field(default_factory=threading.Lock)  # after FINAL the server may not be asked about it


class Front:
    """The model that users call."""

    def __init__(self, args: dict[str, str], config: dict[str, Any]):
        check_instance(config)
        settings = self._settings = read_settings(model_json(args))
        flags = server_flags()
        check_server(settings, flags)
        check_checkpoint(settings)
        check_devices(settings)
        model = Path(settings.model)
        spec = read_spec(model)
        self._max_model_len = settings.max_model_len or spec.max_position_embeddings
        self._vocab_size = spec.vocab_size
        self._has_experts = any(spec.sparse)
        self._defaults = Defaults.of(model, settings.default_max_tokens)
        self._text = Text.read(Path(settings.tokenizer) if settings.tokenizer else model, self._max_model_len)
        self._log = logger("front")
        self._streams: dict[str, _Stream] = {}
        self._ready: queue.SimpleQueue[_Stream | None] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._states: list[StageState | None] = [None] * settings.num_stages  # for metrics
        self._balances = False  # whether `eplb` answered when it was asked last

        others = [] if settings.eplb is None else [EPLB]
        self._stages = BlsStages(
            settings.num_stages,
            [*map(stage_name, range(settings.num_stages)), *others],
            functools.partial(ask, rows=settings.link == "tensor"),
            _reload if flags.explicit else None,
            thread_pool=flags.thread_pool,
            num_threads=(steps_in_flight(settings) + 2) * settings.num_stages + len(others),  # steps, and two questions to each stage
        )
        num_drafts = settings.mtp.num_drafts(spec.num_mtp_layers)
        self._engine = Engine(settings, max_model_len=self._max_model_len, stages=self._stages, num_drafts=num_drafts)
        labels = {"model": settings.served_model_name or args["model_name"], "version": args["model_version"]}
        self._reporter = Reporter(pb_utils.MetricFamily, self._samples, labels, self._engine.stats) if flags.metrics else None
        self._starter = threading.Thread(target=self._start, name="start", daemon=True)
        self._answerer = threading.Thread(target=self._answer_all, name="answer", daemon=True)
        self._canceller = threading.Thread(target=self._look_for_cancelled, name="cancel", daemon=True)
        for thread in (self._starter, self._answerer, self._canceller):
            thread.start()

    def finalize(self) -> None:
        """Every thread of ours that can end does. The server has waited for requests and ended this model's thread pool before it
        calls: a BLS call or an answer that goes there now is never carried out, and crashes the server when it is freed (24.10,
        python_be.cc, ~ModelInstanceState). So calls stop first of all, and nothing is answered."""
        self._stages.stop()
        self._stop.set()
        self._starter.join()
        self._canceller.join()
        if self._reporter:
            self._reporter.stop()
        self._engine.stop()
        self._ready.put(None)
        self._answerer.join()

    def _start(self) -> None:
        """The first BLS call comes well after `initialize`: one before the server has made this model's thread pool crashes the
        whole server (seen on 24.10, and so in its source). It could be asked whether it calls us ready, but a refusal from
        it is freed while it is read (is_model_ready, load_model, metrics: seen, and so in the source)."""
        if self._stop.wait(SETTLE_S):
            return
        self._stages.start()
        self._engine.start()
        if self._reporter:
            self._reporter.start()

    def _samples(self) -> Iterator[Sample]:
        """For metrics. The engine asks stages only when something is wrong; here each is asked anew, so a death shows when idle, too,
        and `eplb`, which nobody else of those asks who can load it again."""
        for stage, state in enumerate(self._states):
            yield from stage_samples(stage, state, self._settings.ranks_per_stage)
            self._stages.post(stage, Parcel(pack_ask(Status())), _STATUS_S, functools.partial(self._hear, stage))
        if self._settings.eplb is not None:
            yield from service_samples(self._balances)
            self._stages.post(self._settings.num_stages, Parcel(pack_push(Status())), _STATUS_S, self._hear_eplb)
        yield from samples(self._engine.stats, self._stages)

    def _hear(self, stage: int, result: Parcel | Exception) -> None:
        answer = None if isinstance(result, Exception) else open_answer(result.packed)
        self._states[stage] = answer if isinstance(answer, StageState) else None

    def _hear_eplb(self, result: Parcel | Exception) -> None:
        self._balances = not isinstance(result, Exception)

    # ---- admission: the server's thread

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._admit(request, sender)
            except Refusal as refusal:
                send_error(sender, refusal)
            except Exception as error:
                self._log.exception("a request could not be read")
                send_error(sender, Refusal("the request could not be read", why=repr(error), kind="internal"))

    def _admit(self, request: Any, sender: Any) -> None:
        tensors = {tensor.name(): _values(tensor) for tensor in request.inputs()}
        order = read_order(tensors, json.loads(request.parameters() or "{}"), request.requested_output_names())
        prompt, prompt_text = self._tokenise(order)
        if order.truncate is not None:
            prompt = prompt[-order.truncate :]
        sampling = make_sampling(
            order.sampling,
            self._defaults,
            encode=self._text and self._text.encode_word,
            vocab_size=self._vocab_size,
            prompt_len=len(prompt),
            max_model_len=self._max_model_len,
        )
        if sampling.stop and self._text is None:
            raise Refusal("stop strings need a tokenizer", why="this checkpoint has no tokenizer.json", fix="send stop_token_ids")
        routed_experts = "routed_experts" in order.returns
        if routed_experts and not self._has_experts:
            raise Refusal("return_routed_experts is not for this model", why="no layer of it has experts", fix="leave it out")
        id = str(next(self._numbers))
        stream = self._streams[id] = _Stream(id, sender, Answer(order, sampling, prompt, prompt_text, self._text))
        timeout_s = order.timeout_s or request.timeout() / 1e6 or self._settings.request_timeout_s
        deadline = time.monotonic() + timeout_s if timeout_s else None
        try:
            self._engine.submit(
                Request(id=id, prompt=prompt, sampling=sampling, priority=order.priority, deadline=deadline, routed_experts=routed_experts),
                lambda emission: self._receive(stream, emission),
            )
        except BaseException:  # also a fault of ours: nobody may ask the server about a stream that is over
            del self._streams[id]
            raise

    def _tokenise(self, order: Order) -> tuple[list[int], str]:
        """(tokens, text) of the prompt."""
        if order.input_ids is not None:
            if max(order.input_ids) >= self._vocab_size or min(order.input_ids) < 0:
                raise Refusal(
                    "input_ids has a token that is not in the vocabulary",
                    why=f"it holds 0 to {self._vocab_size - 1}",
                    fix="check the tokenizer",
                )
            return order.input_ids, self._text.decode(order.input_ids) if self._text and order.echo else ""
        if self._text is None:
            raise Refusal(
                "this checkpoint has no tokenizer", why="there is no tokenizer.json", fix="send input_ids, or set `tokenizer` in model.json"
            )
        if order.text is not None:
            return self._text.encode(order.text, add_special_tokens=order.add_special_tokens), order.text
        rendered = self._text.render(order.messages, **(order.chat or {}))
        return self._text.encode(rendered, add_special_tokens=False), rendered

    # ---- answers: the answer thread

    def _receive(self, stream: _Stream, emission: Emission) -> None:
        """On the engine's thread: hand over and return."""
        stream.inbox.append(emission)
        if not stream.queued:
            stream.queued = True
            self._ready.put(stream)

    def _answer_all(self) -> None:
        while (stream := self._ready.get()) is not None:
            stream.queued = False  # before the inbox is read: what comes later puts it here again
            if stream.id not in self._streams:
                continue
            try:
                self._answer(stream)
            except Exception as error:
                self._log.exception("request %s could not be answered", stream.id)
                self._engine.cancel(stream.id)
                self._close(stream, Refusal("the answer could not be made", why=repr(error), kind="internal"))

    def _answer(self, stream: _Stream) -> None:
        answer = stream.answer
        while stream.inbox:
            emission = stream.inbox.popleft()
            if answer.take(emission):
                self._engine.cancel(stream.id, "stop", emission.index)
        if answer.error is not None:
            self._engine.cancel(stream.id)  # the others of n
            self._close(stream, answer.error)
        elif stream.cancelled:
            if answer.done:
                self._close(stream, Refusal("request cancelled", kind="cancelled"))
        else:
            outputs = answer.outputs()
            response = None if outputs is None else pb_utils.InferenceResponse([_tensor(name, values) for name, values in outputs.items()])
            if answer.done:
                self._close(stream, None, response)
            elif response is not None:
                stream.sender.send(response)

    def _close(self, stream: _Stream, error: Exception | None, response: Any = None) -> None:
        """The one FINAL of a stream."""
        with stream.lock:
            if self._streams.pop(stream.id, None) is None:
                return
            if error is not None:
                send_error(stream.sender, error)
            elif response is not None:
                stream.sender.send(response, flags=FINAL)
            else:
                stream.sender.send(flags=FINAL)

    # ---- cancellation: the cancel thread

    def _look_for_cancelled(self) -> None:
        while not self._stop.wait(_CANCEL_PERIOD_S):
            for stream in list(self._streams.values()):
                with stream.lock:
                    gone = stream.id in self._streams and not stream.cancelled and stream.sender.is_cancelled()
                if gone:
                    stream.cancelled = True
                    self._log.debug("request %s: the client is gone", stream.id)
                    self._engine.cancel(stream.id)


def _values(tensor: Any) -> list[Any]:
    """A tensor's values, flat. A float is the shortest that is stored so: 0.7, as it would be in JSON, not 0.699999988."""
    flat = tensor.as_numpy().reshape(-1)
    return [float(str(value)) for value in flat] if flat.dtype == np.float32 else flat.tolist()


def _tensor(name: str, values: Values) -> Any:
    if _DTYPES[name] is np.object_:
        return pb_utils.Tensor(name, np.array([value.encode() for value in values], dtype=np.object_))
    return pb_utils.Tensor(name, np.array(values, dtype=_DTYPES[name]))


def _reload(model: str) -> None:
    """Unload and load: what brings a model with a dead stub back."""
    pb_utils.unload_model(model)
    pb_utils.load_model(model)
