"""What clients send and get: OpenAI's image API, with what ddit adds to it."""

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ddit.runtime import Request
from ddit.runtime.errors import UsageError
from ddit.runtime.policies.parse import join_schedule

MAX_PICTURES = 10  # of one request, as with OpenAI
MAX_PARTIAL_IMAGES = 3
LARGEST_SEED = 2**53 - 1  # the largest whole number that every JSON reader keeps
SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
WEIGHTS = {"low": 0.25, "normal": 1.0, "high": 4.0}

OutputFormat = Literal["png", "jpeg", "webp"]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body: int = 65_536  # bytes
    body_seconds: float = 10.0  # for all of it to arrive
    prompt: int = 4_000  # characters
    pixels: int | None = None  # of a picture; None: what the bundle's profile holds
    steps: int = 100
    seconds: float = 600.0  # until it is given up

    def patience(self, asked: "RunRequest") -> float:
        """Seconds after which a request is given up."""
        return min(asked.timeout or self.seconds, self.seconds)


class RunRequest(BaseModel):
    """What a request may say of a run, whatever is made."""

    prompt: Annotated[str, Field(min_length=1, description="What it shows.")]
    model: str | None = Field(None, max_length=200, description="The bundle's model; it may be left out.")
    size: str | None = Field("auto", pattern=SIZE, description="WIDTHxHEIGHT in pixels, or auto.")
    # ddit's own
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="Of the first one; a random one if none.")
    steps: int | None = Field(None, ge=1, description="Denoising steps; the bundle's if none.")
    schedule: str | None = Field(None, max_length=1000, description="What every step runs, as ddit-run's --schedule.")
    reuse: str | None = Field(None, max_length=1000, description="Which steps run no level; joins the schedule.")
    budget: Finite | None = Field(None, gt=0, description="Seconds, in place of a schedule.")
    guidance: Finite | None = Field(None, description="Guidance scale.")
    negative_prompt: str | None = Field(None, description="What it shall not show, where the model has such prompts.")
    carry: Finite | None = Field(None, ge=0, le=1, description="Share of native detail that coarse steps take over.")
    text_length: int | None = Field(None, ge=1, description="Tokens of the prompt.")
    priority: Literal["low", "normal", "high"] | None = Field("normal", description="A quarter, one or four shares.")
    timeout: Finite | None = Field(None, gt=0, description="Seconds after which the request is given up.")

    def check(self, limits: Limits) -> None:
        """Raise `UsageError` for what the server does not do."""
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt or "")):
            if len(text) > limits.prompt:
                raise UsageError(f"{name} has {len(text)} characters; at most {limits.prompt} are taken")
        if self.steps is not None and self.steps > limits.steps:
            raise UsageError(f"{self.steps} steps were asked for; at most {limits.steps} are taken")

    def run(self, seed: int, frames: int | None = None) -> Request:
        """What the pipeline is asked for; ``frames`` for models that make clips."""
        width, height = (None, None) if self.size in (None, "auto") else map(int, self.size.split("x"))
        return Request(
            self.prompt,
            seed,
            self.steps,
            join_schedule(self.schedule, self.reuse) or None,
            height,
            width,
            self.guidance,
            self.text_length,
            self.carry,
            self.budget,
            frames=frames,
            negative_prompt=self.negative_prompt,
        )


class ImageRequest(RunRequest):
    """Pictures of a prompt."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"prompt": "a red circle", "seed": 7}})

    n: int | None = Field(1, ge=1, le=MAX_PICTURES, description="How many pictures, of consecutive seeds.")
    response_format: Literal["b64_json"] | None = Field(None, description="Pictures come in the response.")
    output_format: OutputFormat | None = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of JPEG and WebP.")
    stream: bool | None = Field(False, description="Answer with server-sent events.")
    partial_images: int | None = Field(0, ge=0, le=MAX_PARTIAL_IMAGES, description="Pictures on the way, streaming.")
    # OpenAI's, without a meaning here
    background: Literal["opaque", "auto"] | None = None
    moderation: Literal["low", "auto"] | None = None
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    user: str | None = Field(None, max_length=1000)
    safety_identifier: str | None = Field(None, max_length=1000)
    # ddit's own
    progress: bool | None = Field(False, description="Send ddit.progress events too, streaming.")
    trace: bool | None = Field(False, description="Return what every step did.")

    def check(self, limits: Limits) -> None:
        """Raise `UsageError` for what the server does not do."""
        super().check(limits)
        if (self.partial_images or self.progress) and not self.stream:
            raise UsageError("partial_images and progress are for streams; set stream as well")

    def with_seed(self) -> "ImageRequest":
        """The request with a seed, drawn where it has none: asked again, it gives the same pictures."""
        return self if self.seed is not None else self.model_copy(update={"seed": secrets.randbelow(2**32)})

    def requests(self, frames: int | None = None) -> list[Request]:
        """One for every picture; ``frames`` of each, for models that make clips."""
        seed = self.with_seed().seed or 0
        return [self.run(seed + index, frames) for index in range(self.n or 1)]


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """An error, as OpenAI's clients read it."""

    error: ErrorBody


class InputTokens(BaseModel):
    """Of the prompt."""

    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """Tokens: text that the model reads, padding included, and the picture's patches at the native level."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class Made(BaseModel):
    """How a picture came about."""

    seed: int
    schedule: str
    steps: int
    steps_per_level: dict[int, int]
    predicted_steps: int
    smaller_steps: dict[str, int]
    queue_milliseconds: float  # from its acceptance to the first piece of work
    encode_milliseconds: float
    denoise_milliseconds: float  # of the calls it shared with others
    decode_milliseconds: float
    total_milliseconds: float  # from its acceptance


class ImageData(BaseModel):
    """A picture."""

    b64_json: str
    ddit: Made
    trace: dict[str, Any] | None = Field(None, description="Where it was asked for: docs/serving.md.")


class ImagesResponse(BaseModel):
    """Pictures."""

    created: int
    data: list[ImageData]
    size: str
    output_format: OutputFormat
    background: Literal["opaque"] = "opaque"
    usage: Usage


class ModelInfo(BaseModel):
    """A model, as OpenAI describes one, with what this bundle can do."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ddit"
    ddit: dict[str, Any]


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class Health(BaseModel):
    """Whether the server lives, or is ready."""

    status: str
