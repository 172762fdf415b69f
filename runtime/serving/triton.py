"""A bundle as a model of NVIDIA's Triton server: what the ``model.py`` that ``ddit-export triton`` writes is made of.

Triton hands requests over and does not wait: each joins the engine room and is answered from there when its picture is
done, by a response sender in the default mode (python_backend pull request 364, of June 2024). So whatever clients ask
for at once shares the engines step by step, in one instance with one copy of the weights, and HTTP and gRPC stay one
response a request.
"""

import asyncio
import concurrent.futures
import json
import logging
import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ddit.runtime.backends.registry import open_backend
from ddit.runtime.bundle import Bundle, Manifest
from ddit.runtime.costs import warm_up
from ddit.runtime.errors import BackendError, DditError, UsageError
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.policies.parse import join_schedule
from ddit.runtime.request import Request
from ddit.runtime.serving.engine_room import EngineRoom
from ddit.runtime.serving.pictures import made
from ddit.runtime.serving.schema import WEIGHTS
from ddit.runtime.serving.tickets import Closed, Job, RoomFullError, State
from ddit.runtime.serving.worker import Worker

log = logging.getLogger(__name__)
PROMPTS_LOG = logging.getLogger("ddit.runtime.conditioning.text")  # whose warnings hold parts of prompts

Scalar = bytes | int | float

PROMPT = "prompt"
IMAGE, CLIP, REPORT = "image", "clip", "report"  # outputs
FRAMES = "frames"
# Triton's types of the inputs, a value each; all but the prompt may be left out
INPUTS = {
    PROMPT: "STRING",
    "negative_prompt": "STRING",
    "seed": "INT64",
    "height": "INT32",
    "width": "INT32",
    FRAMES: "INT32",
    "steps": "INT32",
    "schedule": "STRING",
    "reuse": "STRING",
    "budget": "FP32",
    "guidance": "FP32",
    "carry": "FP32",
    "text_length": "INT32",
    "priority": "STRING",
}
POLL = 0.5  # seconds between two looks whether the client has gone


class GoneError(DditError):
    """Nobody waits for the picture any more."""


class LateError(DditError):
    """A request took longer than it may."""


def inputs(manifest: Manifest) -> dict[str, str]:
    """The inputs that a bundle's model has, with Triton's types."""
    return {name: kind for name, kind in INPUTS.items() if name != FRAMES or manifest.latent.has_frames}


def asked(values: Mapping[str, Scalar]) -> tuple[Request, float]:
    """A request from the inputs that were given, and its weight. Raises `UsageError`."""
    try:
        given = {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
    except UnicodeDecodeError as error:
        raise UsageError(f"an input is not valid UTF-8: {error.reason}") from None
    priority, reuse = given.pop("priority", "normal"), given.pop("reuse", None)
    if priority not in WEIGHTS:
        raise UsageError(f"there is no priority {priority!r}; choose one of: {', '.join(WEIGHTS)}")
    if reuse is not None:
        given["schedule"] = join_schedule(given.get("schedule"), reuse)  # type: ignore[arg-type,assignment]
    given.setdefault("seed", secrets.randbelow(2**32))
    return Request(**given), WEIGHTS[str(priority)]  # type: ignore[arg-type]  # every name has its type in INPUTS


class Model:
    """What Triton's Python backend asks of a model; each method is called by its one main thread."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle and run every level once; Triton calls the model ready afterwards."""
        # a module that exists only inside Triton
        import triton_python_backend_utils as pb_utils

        self._triton = pb_utils
        entries = json.loads(args["model_config"])["parameters"].items()
        options = {name: entry["string_value"] for name, entry in entries}
        try:
            bundle = Bundle.open(Path(args["model_repository"]) / options["bundle"])  # an absolute path stays itself
            threads = int(options["threads"]) if "threads" in options else None
            tile = int(options["vae_tiling"]) if "vae_tiling" in options else None
            pipeline = Pipeline(bundle, open_backend(options.get("backend"), bundle, threads), vae_tiling=tile)
            self.open(pipeline, in_flight=int(options["in_flight"]), waiting=int(options["waiting"]))
        except DditError as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def open(self, pipeline: Pipeline, *, in_flight: int, waiting: int) -> None:
        """Start the engine room's thread and the one that answers. Raises `BackendError` where no level runs."""
        manifest = pipeline.bundle.manifest
        self._inputs = [*inputs(manifest)]
        self._picture = CLIP if manifest.latent.has_frames else IMAGE
        self._answers: set[concurrent.futures.Future[None]] = set()
        room = EngineRoom(pipeline, in_flight=in_flight, waiting=waiting)
        self.worker = Worker(room, warm_up=lambda: warm_up(pipeline, manifest.size()))
        self.worker.start()
        while not self.worker.ready.wait(POLL):
            if self.worker.broken:
                raise BackendError(self.worker.broken)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="answers", daemon=True)
        self._thread.start()
        self._level = PROMPTS_LOG.level
        PROMPTS_LOG.setLevel(logging.ERROR)

    def execute(self, requests: Sequence[Any]) -> list[None]:
        """Take requests; all are answered later."""
        for request in requests:
            # tensors are Triton's again when this returns
            values = {name: value for name in self._inputs if (value := self._value(request, name)) is not None}
            answer = self._answer(request.get_response_sender(), values, request.timeout() / 1e6)
            future = asyncio.run_coroutine_threadsafe(answer, self._loop)
            self._answers.add(future)
            future.add_done_callback(self._forget)
        return [None] * len(requests)

    def finalize(self) -> None:
        """Finish what was taken."""
        self.worker.stop()
        concurrent.futures.wait([*self._answers])
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        PROMPTS_LOG.setLevel(self._level)

    def _value(self, request: Any, name: str) -> Scalar | None:
        tensor = self._triton.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy().reshape(-1)[:1].tolist()[0]

    def _forget(self, answer: concurrent.futures.Future[None]) -> None:
        self._answers.discard(answer)
        if error := answer.exception():
            log.error("a response could not be sent: %s", error)

    async def _answer(self, sender: Any, values: Mapping[str, Scalar], seconds: float) -> None:
        """Make what was asked for, and send it or say why not. ``seconds`` until it is given up; 0: never."""
        triton = self._triton
        try:
            request, weight = asked(values)
            room = self.worker.room
            run = await asyncio.to_thread(room.resolve, request)
            closed = await self._made(Job(run, room.clock() + seconds if seconds else None, weight), sender)
            assert closed.result is not None
            frames = np.stack([np.asarray(frame) for frame in closed.result.frames])
            report = made(closed).model_dump_json().encode()
            tensors = [
                triton.Tensor(self._picture, frames if self._picture == CLIP else frames[0]),
                triton.Tensor(REPORT, np.array([report], np.object_)),
            ]
            response = triton.InferenceResponse(output_tensors=tensors)
        except Exception as error:  # whatever it is, somebody waits for an answer
            if not isinstance(error, DditError):
                log.exception("a request failed")
            text = str(error) if isinstance(error, DditError) else "something went wrong here"
            response = triton.InferenceResponse(error=triton.TritonError(text, self._code(error)))
        send = partial(sender.send, response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        await asyncio.to_thread(send)

    async def _made(self, job: Job, sender: Any) -> Closed:
        """The end of a job. Raises `DditError` where there is no picture; it is given up when the client goes."""
        async with self.worker.order([job], steps=False) as order:
            while True:
                with suppress(asyncio.TimeoutError):
                    _, event = await asyncio.wait_for(order.next(), POLL)
                    if isinstance(event, Closed):
                        break
                    continue
                if await asyncio.to_thread(sender.is_cancelled):
                    raise GoneError("the client has given the request up")
        if event.error:
            raise event.error
        if event.ticket.state is State.EXPIRED:
            raise LateError("the picture took longer than the request's timeout")
        return event

    def _code(self, error: Exception) -> Any:
        """Triton's code of an error, one of its enumeration."""
        codes = self._triton.TritonError
        if isinstance(error, UsageError):
            return codes.INVALID_ARG
        if isinstance(error, RoomFullError):
            return codes.UNAVAILABLE
        return codes.CANCELLED if isinstance(error, GoneError | LateError) else codes.INTERNAL
