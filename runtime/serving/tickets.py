"""What an engine room is asked for (`Job`), how it keeps it (`Ticket`), and what it says of it (`Event`)."""

import math
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddit.runtime.errors import DditError
from ddit.runtime.pipeline import Result
from ddit.runtime.request import Run
from ddit.runtime.session import Sample
from ddit.runtime.trace import StepRecord


class RoomFullError(DditError):
    """More was asked for than may wait."""

    def __init__(self, message: str, seconds: float = 1.0):
        """``seconds`` after which it may be tried again."""
        super().__init__(message)
        self.seconds = seconds


class State(Enum):
    """Where a request is. It leaves the first three for exactly one of the others, and stays there."""

    WAITING = "waiting"
    DENOISING = "denoising"
    DECODING = "decoding"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"

    @property
    def open(self) -> bool:
        """Whether there is something left to do."""
        return self in (State.WAITING, State.DENOISING, State.DECODING)


class Work(Enum):
    """What a tick does."""

    ENCODE = "encode"
    STEP = "step"
    DECODE = "decode"


@dataclass(frozen=True)
class Job:
    """A run, and how it is to be served."""

    run: Run
    deadline: float | None = None  # seconds on the room's clock; it is given up then, wherever it is
    weight: float = 1.0  # its share of the engines, against others' 1
    partial_images: int = 0  # pictures of the estimate to decode on the way, evenly spaced
    previews: bool = False  # whether steps come with a small preview now and then


@dataclass(eq=False)
class Ticket:
    """An accepted job."""

    job: Job
    arrived: float  # seconds on the room's clock
    finish: float  # the virtual time at which its work would be done if everybody shared the engines
    started: float = math.nan  # seconds on the clock
    closed: float = math.nan
    state: State = State.WAITING
    sample: Sample | None = field(default=None, repr=False)
    partial_images: int = 0  # asked of the decoder so far
    previewed: float = -math.inf  # seconds on the clock, when the last preview was made
    work: float = 0.0  # done for it, in tokens

    @property
    def run(self) -> Run:
        """The run as it was asked for."""
        return self.job.run


@dataclass(frozen=True)
class Started:
    """A ticket has left the queue."""

    ticket: Ticket


@dataclass(frozen=True)
class Stepped:
    """A ticket's sample took a step."""

    ticket: Ticket
    record: StepRecord
    preview: NDArray[np.uint8] | None = None  # the estimate, small, (H, W, 3), where one was wanted


@dataclass(frozen=True)
class PartialImage:
    """What a ticket's picture looks like on the way."""

    ticket: Ticket
    index: int  # from 0
    image: Image.Image


@dataclass(frozen=True)
class Closed:
    """A ticket is done with; its state says how. Nothing follows."""

    ticket: Ticket
    result: Result | None = None  # of a finished one
    error: DditError | None = None  # of a failed one


Event = Started | Stepped | PartialImage | Closed


@dataclass(frozen=True)
class Tick:
    """What the last tick did, for whoever keeps figures."""

    work: Work | None  # None: there was nothing to do
    members: int  # requests that shared it
    limit: int  # that could have
    seconds: float  # of all of it
    own_seconds: float  # outside the engines and their inputs and outputs
